"""What is said about the arms' losses: means by band, curve point, length and recall, and differences in pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dla_train.diagnose.recalled import distance_ranges, means_by_distance
from dla_train.diagnose.statistics import Losses, Means, context_ranges, curve_ranges, document_means, means
from dla_train.evaluate.bands import Bands

Ranges = list[tuple[int, int]]
Value = Callable[[Losses], NDArray[np.float64]]
"""[N, T] losses -> [N, n]: the n numbers of every document that a quantity is the mean of."""


@dataclass(frozen=True)
class Quantity:
    """Some numbers of every arm, and of every other arm minus the first on the same documents."""

    ranges: Ranges
    """Positions, or distances, that each number is of."""
    arms: Mapping[str, Means]
    differences: Mapping[str, Means]

    @property
    def perplexity(self) -> Quantity:
        """Of losses: perplexities, and what they differ by in per cent of the reference's."""
        arms = {name: line.mapped(np.exp) for name, line in self.arms.items()}
        ratios = {name: line.mapped(lambda loss: 100 * np.expm1(loss)) for name, line in self.differences.items()}
        return Quantity(self.ranges, arms, ratios)

    def only(self, chosen: slice) -> Quantity:
        """Some of the numbers."""
        arms = {name: line.only(chosen) for name, line in self.arms.items()}
        return Quantity(self.ranges[chosen], arms, {name: x.only(chosen) for name, x in self.differences.items()})


@dataclass(frozen=True)
class Comparison:
    """Everything that tables and pictures show."""

    reference: str
    """The arm that differences are against."""
    bands: Quantity
    """Nats per token in bands of positions."""
    curve: Quantity
    """Nats per token by position."""
    lengths: Quantity
    """Nats per token over the first so many tokens; perplexity is its exponential."""
    recalled: Quantity
    """Nats per token by the distance of what is recalled (`recalled.distance_ranges`)."""
    in_context: Quantity | None
    """Loss early in the text minus loss late in it: one number; None where the text is too short for it."""


def compare(
    losses: Mapping[str, Losses],
    distances: NDArray[np.int64],
    *,
    band_edges: Sequence[int],
    lengths: Sequence[int],
    bins_per_doubling: int,
    confidence: float,
) -> Comparison:
    """Compare arms whose losses [N, T] are of the same documents; the first is the reference.

    distances: [N, T] of `recalled.recall_distances`. lengths: each in 1 to T. Raises ValueError for edges that do not
    rise inside T.
    """
    reference = next(iter(losses))
    positions = losses[reference].shape[1]

    def over(ranges: Ranges) -> Quantity:
        return _quantity(losses, ranges, lambda x: document_means(x, ranges), confidence)

    by_distance = distance_ranges(positions)
    in_context = None
    if (pair := context_ranges(positions)) is not None:
        both = list(pair)
        in_context = _quantity(losses, both, lambda x: -np.diff(document_means(x, both), axis=1), confidence)
    return Comparison(
        reference=reference,
        bands=over(Bands.of(positions, band_edges).ranges),
        curve=over(curve_ranges(positions, bins_per_doubling)),
        lengths=over([(0, length) for length in lengths]),
        recalled=_quantity(losses, by_distance, lambda x: means_by_distance(x, distances, by_distance), confidence),
        in_context=in_context,
    )


def _quantity(losses: Mapping[str, Losses], ranges: Ranges, value: Value, confidence: float) -> Quantity:
    values = {name: value(of_arm) for name, of_arm in losses.items()}
    reference = next(iter(values))
    return Quantity(
        ranges,
        {name: means(numbers, confidence) for name, numbers in values.items()},
        {name: means(numbers - values[reference], confidence) for name, numbers in values.items() if name != reference},
    )


def default_lengths(positions: int) -> list[int]:
    """Powers of two from 64 below `positions`, and `positions`."""
    return [length for length in (2**power for power in range(6, 40)) if length < positions] + [positions]


def as_plain(quantity: Quantity, counted: str = "documents") -> list[dict[str, Any]]:
    """A quantity as JSON: one object for each number; null where there is nothing to say.

    counted: what its means are over.
    """
    lines = []
    for place in range(len(next(iter(quantity.arms.values())).mean)):
        first, end = quantity.ranges[place]
        line: dict[str, Any] = {"first": first, "end": end}
        line["arms"] = {name: _numbers(found, place, counted) for name, found in quantity.arms.items()}
        line["differences"] = {name: _numbers(found, place, counted) for name, found in quantity.differences.items()}
        lines.append(line)
    return lines


def _numbers(found: Means, place: int, counted: str) -> dict[str, float | int | None]:
    parts = {"mean": found.mean[place], "low": found.low[place], "high": found.high[place]}
    numbers: dict[str, float | int | None] = {k: float(v) if np.isfinite(v) else None for k, v in parts.items()}
    return numbers | {counted: int(found.documents[place])}
