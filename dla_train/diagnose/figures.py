"""Pictures of a comparison: by position, by length and by distance of recall, each above its paired difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dla_train.diagnose.comparison import Comparison, Quantity
from dla_train.diagnose.statistics import Means

COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:gray")


def plot_loss_by_position(found: Comparison, trained: Sequence[int], title: str, path: Path) -> None:
    """Loss of every arm over positions (logarithmic), and what it differs from the reference's, with intervals."""
    figure, (upper, lower) = _panels(title)
    middles = np.array([(first + end - 1) / 2 + 1 for first, end in found.curve.ranges])
    _draw(upper, lower, found.curve, middles, found.reference)
    upper.set_ylabel("nats per token")
    lower.set_ylabel(f"nats more than {found.reference}")
    _dress(upper, lower, found.curve, trained, "tokens of context")
    _save(figure, path)


def plot_perplexity_by_length(found: Comparison, trained: Sequence[int], title: str, path: Path) -> None:
    """Perplexity over the first so many tokens, and its ratio to the reference's in per cent, with intervals."""
    figure, (upper, lower) = _panels(title)
    ends = np.array([end for _, end in found.lengths.ranges], dtype=np.float64)
    perplexity = found.lengths.perplexity
    _draw(upper, lower, perplexity, ends, found.reference, marker="o")
    upper.set_ylabel("perplexity")
    lower.set_ylabel(f"% more than {found.reference}")
    _dress(upper, lower, perplexity, trained, "length of the text in tokens")
    _save(figure, path)


def plot_recalled(found: Comparison, title: str, path: Path) -> None:
    """Loss of recalled targets by the distance of what is recalled, and what it differs from the reference's."""
    figure, (upper, lower) = _panels(title)
    doublings = found.recalled.only(slice(2, None))
    middles = np.array([((first * (end - 1)) ** 0.5) for first, end in doublings.ranges])
    _draw(upper, lower, doublings, middles, found.reference, marker="o")
    upper.set_ylabel("nats per token")
    lower.set_ylabel(f"nats more than {found.reference}")
    _dress(upper, lower, doublings, [], "tokens since what is recalled")
    _save(figure, path)


def _panels(title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure, (upper, lower)


def _draw(
    upper: Axes, lower: Axes, found: Quantity, places: NDArray[np.float64], reference: str, marker: str = ""
) -> None:
    colours = dict(zip(found.arms, COLOURS * len(found.arms), strict=False))
    for axes, lines in ((upper, found.arms), (lower, found.differences)):
        for name, line in lines.items():
            axes.plot(places, line.mean, marker=marker, markersize=4, linewidth=1.5, color=colours[name], label=name)
            alpha = 0.1 if axes is upper else 0.2  # documents differ more than arms do: these bands lie on one another
            axes.fill_between(places, line.low, line.high, color=colours[name], alpha=alpha, linewidth=0)
    lower.axhline(0, color=colours[reference], linewidth=1.2)


def _dress(upper: Axes, lower: Axes, found: Quantity, trained: Sequence[int], label: str) -> None:
    end = max(end for _, end in found.ranges)
    least = min(found.ranges[0][0] or found.ranges[0][1], end / 2)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        for context in sorted({context for context in trained if context < end}):
            axes.axvline(context, color="0.3", linestyle=":", linewidth=1.2)
            if axes is upper:
                axes.annotate(
                    "trained to here",
                    (context, 0.0),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    xytext=(4, 4),
                    fontsize=8,
                    color="0.3",
                )
    _limit(upper, found.arms)
    _limit(lower, found.differences, include=0.0)
    ticks = [2**power for power in range(0, 40) if least <= 2**power <= end]
    lower.set_xscale("log", base=2)
    lower.set_xlim(least * 0.95, end * 1.05)
    step = -(-len(ticks) // 12)
    ticks = ticks[(len(ticks) - 1) % step :: step]
    lower.set_xticks(ticks, [f"{tick // 1024}K" if tick >= 1024 else str(tick) for tick in ticks])
    lower.set_xlabel(label)
    upper.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderpad=0)


def _limit(axes: Axes, lines: Mapping[str, Means], include: float | None = None) -> None:
    """Room for the means and most of the intervals: a few very wide ones would flatten everything else."""
    ends = np.concatenate([np.stack([line.low, line.high]).ravel() for line in lines.values()])
    centres = np.concatenate([line.mean for line in lines.values()])
    ends, centres = ends[np.isfinite(ends)], centres[np.isfinite(centres)]
    if not len(ends):
        return
    if include is not None:
        centres = np.append(centres, include)
    low, high = (
        min(np.append(np.quantile(ends, 0.04), centres.min())),
        max(np.append(np.quantile(ends, 0.96), centres.max())),
    )
    room = 0.06 * (high - low) or 0.01
    axes.set_ylim(low - room, high + room)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=140)
