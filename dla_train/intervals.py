"""Student's t: the mean of one number a seed with its interval. Needs nothing but Python, so any layer may use it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Level of the intervals over seeds."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds."""

    mean: float
    low: float
    """Lower end; nan with fewer than two seeds."""
    high: float
    seeds: int

    def clear_of(self, other: Interval) -> bool:
        """Whether the whole interval lies above the other one."""
        return self.low > other.high


def interval(values: Sequence[float]) -> Interval:
    """Mean of at least one value, one a seed, with its interval."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = t_quantile(0.5 + CONFIDENCE / 2, count - 1) * statistics.stdev(values, mean) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for a probability of at least 0.5; exact for 1 and 2 degrees, else within 0.2%.

    The expansion in 1/degrees around the normal quantile is Abramowitz and Stegun's 26.7.5.
    """
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        share = 2 * probability - 1
        return share * math.sqrt(2 / (1 - share**2))
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))
