"""Two pictures of one head over time: which tokens each slot covers, and with what weight each slot is read.

Each is drawn twice. Against the tokens of the text, where a slot is a band between the boundaries that bound it and a
merge ends a line; and against the list of slots itself, as the memory holds it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dla_train.inspect_memory.history import HeadHistory

GOLDEN = (5**0.5 - 1) / 2
"""Turn of the hue from one boundary to the next: neighbours differ, and hardly any two of a text agree."""
WHITE = 255
"""Where there is no slot."""


def plot_slot_timeline(found: HeadHistory, output: Path, *, title: str) -> None:
    """Write the picture of which tokens the slots cover as a PNG; a slot keeps the colour of its first boundary."""
    figure, (tokens, slots) = _panels(found, title)
    colours = np.rint(255 * slot_colours(found)).astype(np.uint8)
    covered = np.full((found.tokens, found.tokens, 3), WHITE, dtype=np.uint8)
    listed = np.full((found.capacity, found.tokens, 3), WHITE, dtype=np.uint8)
    for time, starts in enumerate(found.live):
        covered[: time + 1, time] = colours[np.array(starts)[found.slot_of_token(time)]]
        listed[: len(starts), time] = colours[starts]
    _image(tokens, covered)
    _image(slots, listed)
    _label(
        tokens, "token held", "each colour is a slot: which tokens it holds as time passes (merges join two colours)"
    )
    _label(slots, "slot, oldest = 0", "the same slots in the order in which the memory holds them")
    _save(figure, output)


def plot_read_weights(found: HeadHistory, output: Path, *, title: str) -> None:
    """Write the heat map of read weights as a PNG: by the tokens a slot holds, and by the slot's recency."""
    figure, (tokens, ranks) = _panels(found, title)
    by_token = np.full((found.tokens, found.tokens), np.nan, dtype=np.float32)
    for time, starts in enumerate(found.live):
        by_token[: time + 1, time] = found.weights[time, len(starts) - 1 - found.slot_of_token(time)]
    scale = Normalize(0, float(np.nanmax(found.weights)))
    shown = _heat(tokens, by_token, scale)
    _heat(ranks, found.weights.T, scale)
    _label(tokens, "token held", "read weight of the slot that holds a token")
    _label(ranks, "recency, open = 0", "read weight of each slot by recency; white: no slot")
    figure.colorbar(shown, ax=[tokens, ranks], label="read weight", fraction=0.04, pad=0.01)
    _save(figure, output)


def slot_colours(found: HeadHistory) -> NDArray[np.float64]:
    """[T, 3] colour of the slot that each token opens; of one that opens none, of the slot that it was written to."""
    number = np.cumsum(found.boundary) - 1
    hue = number * GOLDEN % 1
    light = np.stack([hue, np.full_like(hue, 0.5), np.where(number % 2, 0.95, 0.8)], axis=-1)
    return np.asarray(hsv_to_rgb(light))


def _panels(found: HeadHistory, title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(9, 9), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.2])
    name = f"layer {found.layer}, head {found.head}"
    figure.suptitle(f"{title}\n{name}: {found.tokens} tokens, {found.capacity} states", fontsize=11, x=0.01, ha="left")
    lower.set_xlabel("time (token)")
    return figure, (upper, lower)


def _image(axes: Axes, pixels: NDArray[np.uint8]) -> None:
    axes.imshow(pixels, origin="lower", aspect="auto", interpolation="nearest")


def _heat(axes: Axes, values: NDArray[np.floating], scale: Normalize) -> AxesImage:
    return axes.imshow(
        values, origin="lower", aspect="auto", interpolation="nearest", cmap=colormaps["magma_r"], norm=scale
    )


def _label(axes: Axes, vertical: str, caption: str) -> None:
    axes.set_ylabel(vertical)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(caption, fontsize=9, loc="left", color="0.3")


def _save(figure: Figure, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
