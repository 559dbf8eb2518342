"""Which values a sweep tries: every combination of a grid, or random draws.

Both are pure functions of the sweep: started again, it has the same points. The draw of number n depends on the seed
and n alone, so a larger budget adds settings and changes none.
"""

from __future__ import annotations

import itertools
import math
import random

from dla_train.config import ConfigError
from dla_train.sweep.definition import Axis, Range, Scalar

DIGITS = 6
"""Significant digits of a drawn number: what is in the point's name is what is run."""
DRAWS_PER_SETTING = 1000
"""Draws after which random gives up finding another setting that it has not drawn."""

Values = dict[str, Scalar]


def grid(axes: dict[str, Axis]) -> list[Values]:
    """Every combination, the last axis fastest; [] without axes. The axes are lists (definition.check_sweep)."""
    if not axes:
        return []
    lists = [axis for axis in axes.values() if not isinstance(axis, Range)]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists)]


def draws(axes: dict[str, Axis], budget: int, seed: int) -> list[Values]:
    """`budget` different settings drawn at random. Raises ConfigError if the axes do not have so many."""
    found: dict[tuple[Scalar, ...], Values] = {}
    for number in range(budget * DRAWS_PER_SETTING):
        source = random.Random(f"{seed}/{number}")
        values = {key: _draw(axis, source) for key, axis in axes.items()}
        found.setdefault(tuple(values.values()), values)
        if len(found) == budget:
            return list(found.values())
    raise ConfigError(f"sweep.budget={budget}: the axes have {len(found)} different settings; lower it, or use grid")


def rounded(value: float) -> float:
    """The number to DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")


def corners(axes: dict[str, Axis], limit: int) -> list[Values]:
    """Up to `limit` settings at the ends of ranges and all values of lists, to check before a search starts."""
    ends: dict[str, Axis] = {
        key: (_number(axis, axis.low), _number(axis, axis.high)) if isinstance(axis, Range) else axis
        for key, axis in axes.items()
    }
    lists = [axis for axis in ends.values() if not isinstance(axis, Range)]
    return [dict(zip(axes, values, strict=True)) for values in itertools.islice(itertools.product(*lists), limit)]


def _draw(axis: Axis, source: random.Random) -> Scalar:
    if not isinstance(axis, Range):
        return source.choice(axis)
    if axis.integer and not axis.log:
        return source.randint(math.ceil(axis.low), math.floor(axis.high))
    if axis.log:
        drawn = math.exp(source.uniform(math.log(axis.low), math.log(axis.high)))
    else:
        drawn = source.uniform(axis.low, axis.high)
    return _number(axis, min(max(drawn, axis.low), axis.high))


def _number(axis: Range, value: float) -> int | float:
    return round(value) if axis.integer else rounded(value)
