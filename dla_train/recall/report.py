"""The page of a study: its tables in Markdown, and two pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from dla_kernels.markdown import markdown_table
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
    sections = [
        f"# {study.name}",
        f"Task: {task}. {study.steps} steps of {study.batch_rows} rows, seeds {study.seeds}; right answers in % on "
        f"{study.held_out_rows} held-out rows of each part, mean and {CONFIDENCE:.0%} interval over seeds.",
        _accuracies(found, parts),
        _differences(study, found, parts),
        _steps(study, found, parts),
        _memory(found),
        *_tuning(study, runs),
        *(f"{name} failed: {reason}" for name, reason in runs.failures.items()),
    ]
    return "\n\n".join(sections) + "\n"


def _accuracies(found: Sequence[ArmNumbers], parts: Sequence[str]) -> str:
    rows = [
        [
            numbers.arm.name,
            f"{numbers.arm.parameters:,}",
            f"{numbers.learning_rate:g}",
            *(_percent(numbers.parts[part].accuracy) for part in parts),
            f"void: {numbers.void}" if numbers.void else "",
        ]
        for numbers in found
    ]
    return markdown_table(["arm", "parameters", "lr", *_titles(parts), ""], rows)


def _differences(study: StudyConfig, found: Sequence[ArmNumbers], parts: Sequence[str]) -> str:
    rows = []
    for numbers in found:
        pairs = [numbers.parts[part] for part in parts]
        if any(pair.difference for pair in pairs):
            cells = [_percent(p.difference, "+") + (" *" if p.clear else "") if p.difference else "" for p in pairs]
            rows.append([numbers.arm.name, *cells])
    return (
        f"Points more than `{study.baseline}` of the same backbone, seed by seed; * where the arms' own intervals do "
        f"not meet.\n\n{markdown_table(['arm', *_titles(parts)], rows)}"
    )


def _steps(study: StudyConfig, found: Sequence[ArmNumbers], parts: Sequence[str]) -> str:
    rows = [
        [
            numbers.arm.name,
            *(", ".join(str(step or "-") for step in numbers.parts[part].steps_to_goal) for part in parts),
        ]
        for numbers in found
    ]
    return (
        f"Steps to {100 * study.goal_accuracy:g}% by seed (looked at every {study.curve_interval_steps}; - never).\n\n"
        f"{markdown_table(['arm', *_titles(parts)], rows)}"
    )


def _memory(found: Sequence[ArmNumbers]) -> str:
    rows = [
        [
            numbers.arm.name,
            "" if numbers.boundary_rate is None else f"{numbers.boundary_rate:.3f}",
            "" if numbers.live_slots is None else f"{numbers.live_slots:.1f}",
            "" if numbers.soft_cost is None else f"{100 * numbers.soft_cost:+.2f}%",
            f"{numbers.seconds:.0f}",
        ]
        for numbers in found
    ]
    return (
        "Memory on the held-out rows; soft cost: loss with the boundaries of inference over that with training's; "
        "seconds of a run, side by side with others.\n\n"
        f"{markdown_table(['arm', 'boundary rate', 'live slots', 'soft cost', 'seconds'], rows)}"
    )


def _tuning(study: StudyConfig, runs: StudyRuns) -> list[str]:
    """What chose the learning rates, where something did."""
    if not runs.tuning:
        return []
    rows = [
        [name, *(_tried([*tried[rate].values()], chosen=rate == runs.rates[name]) for rate in study.learning_rates)]
        for name, tried in runs.tuning.items()
    ]
    return [
        f"Tuning: right answers in % over all parts, by learning rate; mean, and each of seeds {study.tuning_seeds}, "
        "which count for nothing else.",
        markdown_table(["arm", *(f"{rate:g}" for rate in study.learning_rates)], rows),
    ]


def _tried(accuracies: Sequence[float], *, chosen: bool) -> str:
    """Mean over seeds, bold for the rate that was chosen, and each seed's."""
    values = [100 * accuracy for accuracy in accuracies]
    mean = f"{sum(values) / len(values):.1f}"
    mean = f"**{mean}**" if chosen else mean
    return f"{mean} ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else mean


def _titles(parts: Sequence[str]) -> list[str]:
    return [part.replace("_", " ") for part in parts]


def _percent(found: Interval, sign: str = "") -> str:
    mean = f"{100 * found.mean:{sign}.1f}"
    return mean if math.isnan(found.low) else f"{mean} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"
