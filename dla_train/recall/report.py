"""The page of a study: its tables in Markdown, and two pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from dla_train.durable import write_atomically
from dla_train.intervals import CONFIDENCE, Interval
from dla_train.recall.comparison import ArmNumbers, compare_arms
from dla_train.recall.figures import plot_accuracy, plot_curves
from dla_train.recall.runs import StudyRuns
from dla_train.recall.settings import StudyConfig


def write_page(study: StudyConfig, runs: StudyRuns, folder: Path, images: Path) -> str:
    """Write NAME.md into `folder`, the pictures into `images`; returns the tables."""
    for place in (folder, images):
        place.mkdir(parents=True, exist_ok=True)
    found = compare_arms(study, runs)
    text = tables(study, runs, found)
    pictures = ""
    if found:
        seeds = f"{len(study.seeds)} seeds"
        accuracy, curves = f"{study.name}_accuracy.png", f"{study.name}_curves.png"
        plot_accuracy(
            found, runs.results, f"{study.name}: {seeds}, mean and {CONFIDENCE:.0%} interval", images / accuracy
        )
        plot_curves(found, runs.results, f"{study.name}: mean and range over {seeds}", images / curves)
        where = Path(os.path.relpath(images, folder))
        pictures = f"\n![Accuracy]({where / accuracy})\n\n![Learning curves]({where / curves})\n"
    write_atomically(folder / f"{study.name}.md", text + pictures)
    return text


def tables(study: StudyConfig, runs: StudyRuns, found: Sequence[ArmNumbers]) -> str:
    """The tables in Markdown."""
    parts = list(found[0].parts) if found else []
    task = ", ".join(f"{key}={value}" for key, value in study.task.items())
    lines = [
        f"# {study.name}",
        "",
        f"Task: {task}. {study.steps} steps of {study.batch_rows} rows, seeds {study.seeds}; right answers in % on "
        f"{study.held_out_rows} held-out rows of each part, mean and {CONFIDENCE:.0%} interval over seeds.",
        "",
        "| arm | parameters | lr | " + " | ".join(part.replace("_", " ") for part in parts) + " | |",
        "|---" * (4 + len(parts)) + "|",
    ]
    for numbers in found:
        cells = [_percent(numbers.parts[part].accuracy) for part in parts]
        void = f"void: {numbers.void}" if numbers.void else ""
        lines.append(_row(numbers.arm.name, f"{numbers.arm.parameters:,}", f"{numbers.learning_rate:g}", *cells, void))
    lines += ["", *_differences(study, found, parts), "", *_steps(study, found, parts), "", *_memory(found)]
    lines += _tuning(study, runs)
    lines += [f"\n{name} failed: {reason}" for name, reason in runs.failures.items()]
    return "\n".join(lines) + "\n"


def _differences(study: StudyConfig, found: Sequence[ArmNumbers], parts: Sequence[str]) -> list[str]:
    lines = [
        f"Points more than `{study.baseline}` of the same backbone, seed by seed; * where the arms' own intervals do "
        "not meet.",
        "",
        "| arm | " + " | ".join(part.replace("_", " ") for part in parts) + " |",
        "|---" * (1 + len(parts)) + "|",
    ]
    for numbers in found:
        pairs = [numbers.parts[part] for part in parts]
        if any(pair.difference for pair in pairs):
            cells = [_percent(p.difference, "+") + (" *" if p.clear else "") if p.difference else "" for p in pairs]
            lines.append(_row(numbers.arm.name, *cells))
    return lines


def _steps(study: StudyConfig, found: Sequence[ArmNumbers], parts: Sequence[str]) -> list[str]:
    lines = [
        f"Steps to {100 * study.goal_accuracy:g}% by seed (looked at every {study.curve_interval_steps}; - never).",
        "",
        "| arm | " + " | ".join(part.replace("_", " ") for part in parts) + " |",
        "|---" * (1 + len(parts)) + "|",
    ]
    for numbers in found:
        cells = [", ".join(str(step or "-") for step in numbers.parts[part].steps_to_goal) for part in parts]
        lines.append(_row(numbers.arm.name, *cells))
    return lines


def _memory(found: Sequence[ArmNumbers]) -> list[str]:
    lines = [
        "Memory on the held-out rows; soft cost: loss with the boundaries of inference over that with training's; "
        "seconds of a run, side by side with others.",
        "",
        "| arm | boundary rate | live slots | soft cost | seconds |",
        "|---|---|---|---|---|",
    ]
    for numbers in found:
        rate = "" if numbers.boundary_rate is None else f"{numbers.boundary_rate:.3f}"
        slots = "" if numbers.live_slots is None else f"{numbers.live_slots:.1f}"
        cost = "" if numbers.soft_cost is None else f"{100 * numbers.soft_cost:+.2f}%"
        lines.append(_row(numbers.arm.name, rate, slots, cost, f"{numbers.seconds:.0f}"))
    return lines


def _tuning(study: StudyConfig, runs: StudyRuns) -> list[str]:
    """What chose the learning rates, where something did."""
    if not runs.tuning:
        return []
    lines = [
        "",
        f"Tuning: right answers in % over all parts, by learning rate; mean, and each of seeds {study.tuning_seeds}, "
        "which count for nothing else.",
        "",
        "| arm | " + " | ".join(f"{rate:g}" for rate in study.learning_rates) + " |",
        "|---" * (1 + len(study.learning_rates)) + "|",
    ]
    for name, tried in runs.tuning.items():
        cells = []
        for rate in study.learning_rates:
            values = [100 * accuracy for accuracy in tried[rate].values()]
            mean = f"{sum(values) / len(values):.1f}"
            mean = f"**{mean}**" if rate == runs.rates[name] else mean
            seeds = ", ".join(f"{value:.1f}" for value in values)
            cells.append(f"{mean} ({seeds})" if len(values) > 1 else mean)
        lines.append(_row(name, *cells))
    return lines


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(found: Interval, sign: str = "") -> str:
    mean = f"{100 * found.mean:{sign}.1f}"
    return mean if math.isnan(found.low) else f"{mean} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"
