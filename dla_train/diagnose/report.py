"""What a comparison leaves in its folder: diagnostics.json, diagnostics.npz, diagnostics.md and three pictures."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dla_kernels.markdown import markdown_table
from dla_train.checkpoint.checkpointer import own_version
from dla_train.data.indexed import TokenFiles
from dla_train.diagnose.arms import Arm
from dla_train.diagnose.comparison import Comparison, Quantity, as_plain
from dla_train.diagnose.figures import plot_loss_by_position, plot_perplexity_by_length, plot_recalled
from dla_train.diagnose.scoring import Documents
from dla_train.diagnose.seeds import SAME_OF_ARM
from dla_train.diagnose.settings import DiagnoseConfig
from dla_train.diagnose.statistics import Losses, Means, position_sums
from dla_train.durable import write_atomically
from dla_train.models.cost import parameter_count

NAME = "diagnostics"
CURVE, PERPLEXITY, RECALLED = "loss_by_position.png", "perplexity_by_length.png", "recalled.png"


def write_report(
    settings: DiagnoseConfig,
    arms: Sequence[Arm],
    files: TokenFiles,
    documents: Documents,
    losses: Mapping[str, Losses],
    found: Comparison,
) -> str:
    """Write everything into settings.output; returns the tables."""
    _write_arrays(Path(settings.output) / f"{NAME}.npz", documents, losses)
    facts = _facts(settings, arms, files, documents) | {"versions": _versions()}
    return _write(settings, facts, found, f"{len(documents.numbers)} documents", "documents")


def write_seeds(settings: DiagnoseConfig, reports: Sequence[dict[str, Any]], found: Comparison) -> str:
    """Write the comparison over seeds into settings.output; returns the tables."""
    same = {"settings": dataclasses.asdict(settings), "text": reports[0]["text"], "versions": _versions()}
    arms = [{key: arm[key] for key in SAME_OF_ARM} for arm in reports[0]["arms"]]
    seeds = [[arm["seed"] for arm in report["arms"]] for report in reports]
    return _write(settings, same | {"arms": arms, "seeds": seeds}, found, f"{len(reports)} seeds", "seeds")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "dla-train": own_version()}


def _write(settings: DiagnoseConfig, facts: dict[str, Any], found: Comparison, over: str, counted: str) -> str:
    """The numbers, tables and pictures of a comparison whose means are over so many documents or seeds."""
    folder = Path(settings.output)
    numbers = {name: as_plain(getattr(found, name), counted) for name in ("bands", "lengths", "curve", "recalled")}
    in_context = as_plain(found.in_context, counted)[0] if found.in_context is not None else None
    whole = facts | numbers | {"in_context": _in_context(found, in_context)}
    text = tables(found, facts)
    trained = [arm["trained_context_tokens"] for arm in facts["arms"]]
    interval = f"{settings.confidence:.0%} intervals over {over}, paired below"
    plot_loss_by_position(found, trained, f"Loss by position; {interval}", folder / CURVE)
    plot_perplexity_by_length(found, trained, f"Perplexity by length; {interval}", folder / PERPLEXITY)
    plot_recalled(found, f"Recalled targets; {interval}", folder / RECALLED)
    pictures = {"Loss by position": CURVE, "Perplexity": PERPLEXITY, "Recalled": RECALLED}
    shown = "\n\n".join(f"![{title}]({name})" for title, name in pictures.items())
    write_atomically(folder / f"{NAME}.md", f"{text}\n{shown}\n")
    write_atomically(folder / f"{NAME}.json", json.dumps(whole, indent=1) + "\n")
    return text


def _facts(settings: DiagnoseConfig, arms: Sequence[Arm], files: TokenFiles, documents: Documents) -> dict[str, Any]:
    described = [
        {
            "name": arm.name,
            "run": str(arm.run),
            "step": arm.step,
            "checkpoint_sha256": arm.checkpoint_sha256,
            "model": arm.config.model.name,
            "memory": dataclasses.asdict(arm.config.memory),
            "parameters": parameter_count(arm.config.model, arm.config.memory),
            "trained_context_tokens": arm.trained_tokens,
            "seed": arm.config.seed,
        }
        for arm in arms
    ]
    return {
        "settings": dataclasses.asdict(settings),
        "arms": described,
        "text": {
            "prefixes": files.prefixes,
            "fingerprint": files.fingerprint,
            "documents": len(documents.numbers),
            "positions": documents.positions,
            "targets": int((documents.lengths - 1).sum()),
        },
    }


def _in_context(found: Comparison, numbers: dict[str, Any] | None) -> dict[str, Any] | None:
    """The score says which positions it compares."""
    if found.in_context is None or numbers is None:
        return None
    early, late = found.in_context.ranges
    return {"early": early, "late": late, "arms": numbers["arms"], "differences": numbers["differences"]}


def _write_arrays(path: Path, documents: Documents, losses: Mapping[str, Losses]) -> None:
    """Raw numbers: of every token float32, by position sums and sums of squares in float64."""
    names = list(losses)
    nats = np.stack([losses[name] for name in names])
    wide = nats.astype(np.float64)
    sums = [position_sums(of_arm) for of_arm in wide]
    paired = [position_sums(other - wide[0]) for other in wide[1:]]
    partial = path.with_name(path.name + ".partial.npz")
    np.savez_compressed(
        partial,
        names=np.array(names),
        nats=nats,
        document=documents.numbers,
        count=np.stack([s.count for s in sums]),
        total=np.stack([s.total for s in sums]),
        squares=np.stack([s.squares for s in sums]),
        difference_total=np.stack([s.total for s in paired]),
        difference_squares=np.stack([s.squares for s in paired]),
    )
    partial.replace(path)


def tables(found: Comparison, facts: dict[str, Any]) -> str:
    """The headline numbers as Markdown."""
    text, arms, reference, perplexity = facts["text"], facts["arms"], found.reference, found.lengths.perplexity
    runs = "; ".join(f"{arm['name']}: {arm['model']} x {arm['memory']['policy']}, step {arm['step']}" for arm in arms)
    bands = [f"{a} to {b - 1}" for a, b in found.bands.ranges]
    lengths = [f"{b}" for _, b in perplexity.ranges]
    sections = [
        "# Diagnostics",
        f"{runs}. {_seeds(facts)}{text['documents']} documents, {text['positions']:,} positions, "
        f"{text['targets']:,} targets.",
        _table("nats per token at positions", found.bands, bands, reference),
        _table("perplexity of the first tokens", perplexity, lengths, f"{reference}, %"),
        _table("nats per token by distance", found.recalled, _distances(found.recalled), reference),
    ]
    if found.in_context is not None:
        (a, b), (c, d) = found.in_context.ranges
        score = f"loss at {a} to {b - 1}, less at {c} to {d - 1}"
        sections.append(_table("in-context-learning score", found.in_context, [score], reference))
    return "\n\n".join(sections) + "\n"


def _seeds(facts: dict[str, Any]) -> str:
    return f"Seeds {', '.join(str(of_arms[0]) for of_arms in facts['seeds'])}. " if "seeds" in facts else ""


def _distances(recalled: Quantity) -> list[str]:
    """Names of the ranges of `distance_ranges`."""
    doublings = [f"recalled from {a} to {b - 1} back" for a, b in recalled.ranges[2:]]
    return ["not recalled", "recalled", *doublings]


def _table(title: str, found: Quantity, names: Sequence[str], reference: str) -> str:
    """A row for each name; `reference` is what the columns of differences say they are against."""
    head = [title, *found.arms, *(f"{arm} - {reference}" for arm in found.differences)]
    rows = []
    for place, name in enumerate(names):
        cells = [_cell(line, place, "") for line in found.arms.values()]
        rows.append([name, *cells, *(_cell(line, place, "+") for line in found.differences.values())])
    return markdown_table(head, rows)


def _cell(line: Means, place: int, sign: str) -> str:
    """`mean [low, high]`, the mean alone of one document, and `-` where there is none."""
    digits = 3 if abs(line.mean[place]) < 10 else 1
    mean, low, high = (f"{values[place]:{sign}.{digits}f}" for values in (line.mean, line.low, line.high))
    return {0: "-", 1: mean}.get(int(line.documents[place]), f"{mean} [{low}, {high}]")
