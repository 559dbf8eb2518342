"""Means over documents with confidence intervals, and the sums by position they can be made of again.

Losses are arrays [documents, positions], nan where a document has no target. An interval is Student's t over documents,
of values that are one number a document: a mean over some positions, or the difference of two arms' means on the same
document. Differences are taken before means, so what documents have in common cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dla_train.intervals import t_quantile

Losses = NDArray[np.floating]


@dataclass(frozen=True)
class PositionSums:
    """What adds up over documents, by position: [positions] each."""

    count: NDArray[np.int64]
    """Documents with a target there."""
    total: NDArray[np.float64]
    """Sum of their values."""
    squares: NDArray[np.float64]
    """Sum of the values' squares."""


@dataclass(frozen=True)
class Means:
    """Means over documents of some quantities [n], with their intervals; nan where there is nothing to say."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    """Lower end; nan with fewer than two documents."""
    high: NDArray[np.float64]
    """Upper end."""
    documents: NDArray[np.int64]
    """Documents in each mean."""

    def mapped(self, function: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Means:
        """The same under a rising function, such as the exponential that makes a loss a perplexity."""
        return Means(function(self.mean), function(self.low), function(self.high), self.documents)

    def only(self, chosen: slice) -> Means:
        """Some of the quantities."""
        return Means(self.mean[chosen], self.low[chosen], self.high[chosen], self.documents[chosen])


def position_sums(losses: Losses) -> PositionSums:
    """Count, sum and sum of squares over documents [N, T], in float64."""
    there = ~np.isnan(losses)
    values = np.where(there, losses, 0).astype(np.float64)
    return PositionSums(there.sum(0), values.sum(0), np.square(values).sum(0))


def document_means(losses: Losses, ranges: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """[N, ranges] float64: each document's mean over positions [first, end); nan where it has no target there."""
    there = ~np.isnan(losses)
    values = np.where(there, losses, 0).astype(np.float64)
    sums = np.stack([values[:, first:end].sum(1) for first, end in ranges], axis=1)
    counts = np.stack([there[:, first:end].sum(1) for first, end in ranges], axis=1)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def means(values: NDArray[np.float64], confidence: float) -> Means:
    """Mean over documents of values [N, n] (nan: not that document) with Student's t interval."""
    there = ~np.isnan(values)
    count = there.sum(0)
    some = np.maximum(count, 1)
    mean = np.where(there, values, 0).sum(0) / some
    spread = np.square(np.where(there, values - mean, 0)).sum(0)
    quantiles = np.array([t_quantile(0.5 + confidence / 2, n - 1) if n > 1 else np.nan for n in count])
    half = quantiles * np.sqrt(spread / np.maximum(count - 1, 1) / some)
    mean = np.where(count > 0, mean, np.nan)
    return Means(mean, mean - half, mean + half, count)


def curve_ranges(positions: int, per_doubling: int) -> list[tuple[int, int]]:
    """Ranges [first, end) that cover 0 to `positions`, `per_doubling` of them each time the position doubles."""
    edges = [0, 1]
    while edges[-1] < positions:
        edges.append(max(edges[-1] + 1, round(edges[-1] * 2 ** (1 / per_doubling))))
    edges[-1] = positions
    if len(edges) > 3 and edges[-1] - edges[-2] < (edges[-2] - edges[-3]) / 2:  # the rest is no range of its own
        del edges[-2]
    return list(zip(edges, edges[1:], strict=False))


def context_ranges(positions: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The early and the late positions whose loss is compared: how much a model makes of its context.

    Around position 50, and the last 500 or last quarter, whichever is shorter. None where these would meet.
    """
    early, late = (40, 60), (positions - min(500, positions // 4), positions)
    return (early, late) if late[0] >= 2 * early[1] else None
