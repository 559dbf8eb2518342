"""Pictures of a study: accuracy by part, and the learning curves behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dla_train.recall.arms import ATTENTION
from dla_train.recall.comparison import ArmNumbers
from dla_train.recall.training import RunResult

COLOURS = ("tab:blue", "tab:green", "tab:orange", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
"""Of the memories, in the order of the settings."""
MOST_LEVEL = 5
"""Parts whose names have room beside each other; those of more slope."""
SLOPE: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}


def plot_accuracy(
    found: Sequence[ArmNumbers], results: Mapping[str, Mapping[int, RunResult]], title: str, path: Path
) -> None:
    """Accuracy on every part, a panel a backbone: every seed faintly, mean and interval; void arms are hollow."""
    panels = _panels(found)
    figure = Figure(figsize=(1.2 + 5.2 * len(panels), 4.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (backbone, arms) in zip(axes, panels.items(), strict=True):
        for place, numbers in enumerate(arms):
            parts = list(numbers.parts)
            centres = np.arange(len(parts)) + 0.12 * (place - (len(arms) - 1) / 2)
            accuracies = [numbers.parts[part].accuracy for part in parts]
            heights = np.array([100 * accuracy.mean for accuracy in accuracies])
            reach = np.array([[100 * (a.mean - a.low), 100 * (a.high - a.mean)] for a in accuracies]).T
            colour = "0.4" if numbers.arm.name == ATTENTION else COLOURS[place % len(COLOURS)]
            for result in results[numbers.arm.name].values():
                seed = [100 * result.parts[part].accuracy for part in parts]
                ax.plot(centres - 0.035, seed, "o", color=colour, alpha=0.3, markersize=3)
            ax.errorbar(
                centres,
                heights,
                yerr=np.nan_to_num(reach),
                fmt="o",
                color=colour,
                markerfacecolor="white" if numbers.void else colour,
                markersize=5,
                capsize=3,
                label=_label(numbers) + (" (void)" if numbers.void else ""),
            )
        slope = SLOPE if len(parts) > MOST_LEVEL else {}
        ax.set_xticks(np.arange(len(parts)), [part.replace("_", " ") for part in parts], **slope)
        ax.set_title(backbone, fontsize=10)
        ax.grid(axis="y", alpha=0.25)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("right answers, %")
    axes[0].set_ylim(0, 102)
    figure.savefig(path, dpi=140)


def plot_curves(
    found: Sequence[ArmNumbers], results: Mapping[str, Mapping[int, RunResult]], title: str, path: Path
) -> None:
    """Accuracy by step: mean over seeds, the range of the seeds shaded; a row a part, a column a backbone."""
    panels = _panels(found)
    parts = list(found[0].parts)
    figure = Figure(figsize=(1.2 + 4.6 * len(panels), 0.8 + 2.6 * len(parts)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(parts), len(panels), sharex=True, sharey=True, squeeze=False)
    for column, (backbone, arms) in enumerate(panels.items()):
        for row, part in enumerate(parts):
            ax = grid[row][column]
            for place, numbers in enumerate(arms):
                curves = [result.curve for result in results[numbers.arm.name].values()]
                steps = [step for step, _ in curves[0]]
                values = 100 * np.array([[accuracies[part] for _, accuracies in curve] for curve in curves])
                colour = "0.4" if numbers.arm.name == ATTENTION else COLOURS[place % len(COLOURS)]
                ax.plot(steps, values.mean(0), color=colour, label=_label(numbers))
                ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            ax.set_title(f"{backbone}, {part.replace('_', ' ')}", fontsize=9)
            ax.grid(alpha=0.25)
            ax.set_ylim(0, 102)
    for ax in grid[-1]:
        ax.set_xlabel("step")
    grid[0][0].legend(fontsize=8)
    figure.supylabel("right answers, %", fontsize=9)
    figure.savefig(path, dpi=140)


def _panels(found: Sequence[ArmNumbers]) -> dict[str, list[ArmNumbers]]:
    """Arms by backbone; attention, which has no backbone of its own, is in every panel."""
    backbones = list(dict.fromkeys(numbers.arm.backbone for numbers in found if numbers.arm.name != ATTENTION))
    attention = [numbers for numbers in found if numbers.arm.name == ATTENTION]
    if not backbones:
        return {ATTENTION: attention}
    return {name: [n for n in found if n.arm.backbone == name] + attention for name in backbones}


def _label(numbers: ArmNumbers) -> str:
    return numbers.arm.name if numbers.arm.name == ATTENTION else numbers.arm.memory.replace("_", " ")
