"""Merge map: a text as one head's memory divides it.

Every token is drawn on the colour of the slot that holds it at the end; black bars are the boundaries that still
stand, red dotted ones were boundaries that a merge removed. Below, each token's drift and the threshold it is compared
with.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dla_train.data.incremental_text import token_pieces
from dla_train.data.tokenizer import Tokenizer, load_tokenizer
from dla_train.evaluate.loading import load_model
from dla_train.models.language_model import LanguageModel
from dla_train.models.recurrent import RecurrentMixer

COLUMNS = 100
"""Characters in a line of the drawn text."""
COLOURS = [tuple(0.45 + 0.55 * channel for channel in colormaps["tab10"](index)[:3]) for index in range(10)]
"""Pale colours of the slots, in turn."""


@dataclass(frozen=True)
class MergeMap:
    """What one head's memory did with a text of T tokens."""

    pieces: list[str]
    """Text of each token."""
    score: list[float]
    """Drift of each token."""
    boundary: list[bool]
    """Whether the token opened a slot."""
    slot_starts: list[int]
    """First token of each slot that is alive after the last token, oldest first."""
    tau: float | None
    """Threshold of this head; None for a policy that does not score."""
    layer: int
    head: int


@torch.no_grad()
def merge_map(model: LanguageModel, tokenizer: Tokenizer, text: str, *, layer: int, head: int) -> MergeMap:
    """Run `text` through `model` (hard boundaries) and read off one head's plan.

    Raises ValueError for a layer or head the model does not have, a softmax layer, or an empty text.
    """
    shape = model.model_config
    if not 0 <= layer < shape.num_layers or not 0 <= head < shape.num_heads:
        has = f"the model has layers 0 to {shape.num_layers - 1} and heads 0 to {shape.num_heads - 1}"
        raise ValueError(f"layer={layer}, head={head}: {has}")
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the text is empty; give at least one token")
    was_training = model.training
    model.eval()
    model(torch.tensor([ids], device=model.embedding.weight.device), keep_plans=True)
    model.train(was_training)
    plan = model.memory_plans[layer]
    mixer = model.get_submodule(f"blocks.{layer}.mixer")
    if plan is None or not isinstance(mixer, RecurrentMixer):
        raise ValueError(f"layer {layer} is softmax attention: it has no memory slots to draw")
    tau = mixer.reader.tau
    starts = plan.slot_starts()[0, -1, head]
    return MergeMap(
        pieces=token_pieces(ids, tokenizer),
        score=plan.score[0, :, head].tolist(),
        boundary=plan.boundary[0, :, head].tolist(),
        slot_starts=starts[starts >= 0].tolist(),
        tau=None if tau is None else float(tau()[head]),
        layer=layer,
        head=head,
    )


@torch.no_grad()
def typical_head(model: LanguageModel, tokenizer: Tokenizer, text: str, rate: float) -> tuple[int, int]:
    """(layer, head) whose boundaries per token of `text` come closest to `rate`."""
    was_training = model.training
    model.eval()
    model.reset_memory_statistics()
    model(torch.tensor([tokenizer.encode(text)], device=model.embedding.weight.device))
    boundaries, decisions = model.memory_statistics()[..., :2].unbind(-1)
    model.reset_memory_statistics()
    model.train(was_training)
    best = int((boundaries / decisions.clamp_min(1) - rate).abs().flatten().argmin())
    return divmod(best, model.model_config.num_heads)


def plot_merge_map(found: MergeMap, output: Path, *, title: str) -> None:
    """Write the picture as a PNG."""
    places, lines = _typeset(found.pieces)
    columns = max(COLUMNS // 2, *(column + len(shown) for parts in places for _, column, shown in parts))
    figure = Figure(figsize=(0.085 * columns + 0.8, 0.19 * lines + 3.2), layout="constrained")
    text, drift = figure.subplots(2, 1, height_ratios=[0.19 * lines + 0.3, 2.0])
    _draw_text(text, found, places)
    text.set_xlim(-0.5, columns + 0.5)
    text.set_ylim(lines, 0)
    _draw_drift(drift, found)
    opened, left = sum(found.boundary), len(found.slot_starts)
    counts = f"{len(found.pieces)} tokens, {opened} boundaries, {opened - left} merged away, {left} slots at the end"
    text.set_title(f"{title}\nlayer {found.layer}, head {found.head}: {counts}", fontsize=11, loc="left")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)


def _typeset(pieces: list[str]) -> tuple[list[list[tuple[int, int, str]]], int]:
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


def _slot_colours(found: MergeMap) -> list[tuple[float, ...]]:
    """Colour of every token: neighbours among the surviving slots differ."""
    starts = set(found.slot_starts)
    slot, colours = -1, []
    for token in range(len(found.pieces)):
        slot += token in starts
        colours.append(COLOURS[slot % len(COLOURS)])
    return colours


def _draw_text(axes: Axes, found: MergeMap, places: list[list[tuple[int, int, str]]]) -> None:
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


def _draw_drift(axes: Axes, found: MergeMap) -> None:
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


def main(arguments: list[str] | None = None) -> int:
    """Draw the merge map of a text file (or standard input) for a run's newest checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m dla_train.evaluate.merge_map",
        description="Draw how one head's memory divides a text.",
        epilog="example: python -m dla_train.evaluate.merge_map --run runs/my-run --output map.png < text",
    )
    parser.add_argument("--run", required=True, help="run folder (config and checkpoints)")
    parser.add_argument("--text", type=Path, help="UTF-8 text file; standard input by default")
    parser.add_argument("--layer", type=int, default=0, help="layer, from 0 (default %(default)s)")
    parser.add_argument("--head", type=int, default=0, help="head, from 0 (default %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args(arguments)
    try:
        model, config, step = load_model(options.run)
        text = options.text.read_text(encoding="utf-8") if options.text else sys.stdin.read()
        found = merge_map(model, load_tokenizer(config.data.tokenizer), text, layer=options.layer, head=options.head)
    except (ValueError, FileNotFoundError) as error:
        print(f"merge_map: error: {error}", file=sys.stderr)
        return 2
    plot_merge_map(found, options.output, title=f"{config.name}, step {step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
