"""Merge map: a text as one head's memory divides it, as a picture.

Every token is drawn on the colour of the slot that holds it at the end; black bars are the boundaries that still
stand, red dotted ones were boundaries that a merge removed. Below, each token's drift and the threshold it is compared
with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dla_train.inspect_memory.history import HeadHistory

COLUMNS = 100
"""Characters in a line of the drawn text."""
COLOURS = [tuple(0.45 + 0.55 * channel for channel in colormaps["tab10"](index)[:3]) for index in range(10)]
"""Pale colours of the slots, in turn."""


def plot_merge_map(pieces: Sequence[str], found: HeadHistory, output: Path, *, title: str) -> None:
    """Write the picture of a text of tokens `pieces` as a PNG."""
    places, lines = _typeset(pieces)
    columns = max(COLUMNS // 2, *(column + len(shown) for parts in places for _, column, shown in parts))
    figure = Figure(figsize=(0.085 * columns + 0.8, 0.19 * lines + 3.4), layout="constrained")
    text, drift = figure.subplots(2, 1, height_ratios=[0.19 * lines + 0.3, 2.0])
    _draw_text(text, found, places)
    text.set_xlim(-0.5, columns + 0.5)
    text.set_ylim(lines, 0)
    _draw_drift(drift, found)
    opened, left = int(found.boundary.sum()), len(found.slot_starts)
    counts = f"{found.tokens} tokens, {opened} boundaries, {opened - left} merged away, {left} slots at the end"
    heading = f"{title}\nlayer {found.layer}, head {found.head}\n{counts}"  # in lines: a short text is a narrow picture
    figure.suptitle(heading, fontsize=10, x=0.01, ha="left")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)


def _typeset(pieces: Sequence[str]) -> tuple[list[list[tuple[int, int, str]]], int]:
    """(line, column, text) of every token's parts, broken at newlines and at COLUMNS; and the number of lines."""
    places: list[list[tuple[int, int, str]]] = []
    line = column = 0
    for piece in pieces:
        parts = []
        rows = piece.replace("\t", "    ").split("\n")
        for number, row in enumerate(rows):
            shown = row + ("\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}" if number < len(rows) - 1 else "")
            if column and column + len(shown) > COLUMNS:
                line, column = line + 1, 0
            if shown:
                parts.append((line, column, shown))
            column += len(shown)
            if number < len(rows) - 1:
                line, column = line + 1, 0
        places.append(parts)
    return places, line + 1


def _slot_colours(found: HeadHistory) -> list[tuple[float, ...]]:
    """Colour of every token: neighbours among the surviving slots differ."""
    starts = set(found.slot_starts)
    slot, colours = -1, []
    for token in range(found.tokens):
        slot += token in starts
        colours.append(COLOURS[slot % len(COLOURS)])
    return colours


def _draw_text(axes: Axes, found: HeadHistory, places: list[list[tuple[int, int, str]]]) -> None:
    colours, alive = _slot_colours(found), set(found.slot_starts)
    for token, parts in enumerate(places):
        for line, column, shown in parts:
            axes.add_patch(Rectangle((column, line), len(shown), 1, color=colours[token], linewidth=0))
            for offset, character in enumerate(shown):
                axes.text(
                    column + offset + 0.5,
                    line + 0.5,
                    character,
                    family="monospace",
                    fontsize=9.5,
                    ha="center",
                    va="center",
                    parse_math=False,
                )
        if found.boundary[token] and parts:
            line, column, _ = parts[0]
            style = (
                {"color": "black", "linewidth": 2.0}
                if token in alive
                else {"color": "red", "linewidth": 1.0, "linestyle": ":"}
            )
            axes.plot([column, column], [line, line + 1], **style)  # type: ignore[arg-type]
    axes.set_axis_off()


def _draw_drift(axes: Axes, found: HeadHistory) -> None:
    alive = set(found.slot_starts)
    colours = _slot_colours(found)
    axes.bar(range(len(found.score)), found.score, color=colours, width=1.0)
    kept = [t for t in range(len(found.score)) if found.boundary[t] and t in alive]
    gone = [t for t in range(len(found.score)) if found.boundary[t] and t not in alive]
    axes.plot(
        kept, [found.score[t] for t in kept], "k|", markersize=10, markeredgewidth=2, label="boundary of a live slot"
    )
    axes.plot(gone, [found.score[t] for t in gone], "r.", markersize=4, label="boundary merged away")
    if found.tau is not None:
        axes.axhline(found.tau, color="0.2", linestyle="--", linewidth=1, label=f"tau {found.tau:.2f}")
    axes.set_xlim(-0.5, len(found.score) - 0.5)
    axes.set_ylim(0, 2)
    axes.set_xlabel("token")
    axes.set_ylabel("drift")
    axes.legend(loc="upper right", ncols=3, fontsize=8)
