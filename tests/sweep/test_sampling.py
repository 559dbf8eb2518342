"""Grids and draws: pure functions of the sweep, without repetition, inside their bounds."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_train.config import ConfigError
from dla_train.sweep.definition import Axis, Range
from dla_train.sweep.sampling import corners, draws, grid

KEYS = st.sampled_from(["memory.tau", "memory.capacity", "optim.lr", "memory"])
LISTS = st.lists(
    st.one_of(st.integers(-5, 99), st.floats(0.1, 9.0), st.text("abc", min_size=1)), min_size=1, max_size=4
)
CHOICES = LISTS.map(lambda values: tuple({str(value): value for value in values}.values()))
GRIDS = st.dictionaries(KEYS, CHOICES, min_size=1, max_size=3)


@st.composite
def ranges(draw: st.DrawFn) -> Range:
    integer = draw(st.booleans())
    bound = st.integers(1, 10_000) if integer else st.integers(1, 10_000).map(lambda value: value / 1000)
    low, high = sorted(draw(st.lists(bound, min_size=2, max_size=2, unique=True)))
    return Range(low, high, log=draw(st.booleans()), integer=integer)


@given(GRIDS)
@settings(max_examples=60, deadline=None)
def test_a_grid_is_every_combination_once(axes: dict[str, Axis]) -> None:
    found = grid(axes)
    assert len(found) == math.prod(len(axis) for axis in axes.values() if not isinstance(axis, Range))
    assert len({tuple(map(str, values.values())) for values in found}) == len(found)
    assert all(list(values) == list(axes) and all(values[key] in axes[key] for key in axes) for values in found)
    assert corners(axes, 3) == found[:3]


@given(st.dictionaries(KEYS, ranges(), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_draws_lie_inside_their_bounds_and_a_larger_budget_keeps_them(
    axes: dict[str, Range], budget: int, seed: int
) -> None:
    room = max((axis.high - axis.low + 1 if axis.integer else 1000) for axis in axes.values())
    budget = min(budget, int(room) - 1) or 1
    found = draws(axes, budget, seed)
    assert draws(axes, budget, seed) == found
    assert draws(axes, 1, seed) == found[:1]
    assert len({tuple(values.values()) for values in found}) == budget
    for values in found:
        for key, axis in axes.items():
            assert axis.low <= values[key] <= axis.high
            assert isinstance(values[key], int) == axis.integer
            assert float(f"{values[key]:.6g}") == values[key]


def test_a_seed_changes_the_draws_and_log_draws_spread_over_magnitudes() -> None:
    axes: dict[str, Axis] = {"optim.lr": Range(1e-4, 1.0, log=True)}
    assert draws(axes, 3, 0) != draws(axes, 3, 1)
    below = sum(values["optim.lr"] < 1e-2 for values in draws(axes, 200, 0))
    assert 70 < below < 130, "half of the magnitudes lie below 1e-2"


def test_more_draws_than_there_are_settings_is_an_error() -> None:
    with pytest.raises(ConfigError, match="sweep.budget=5: the axes have 4 different settings"):
        draws({"a": (1, 2), "b": (1, 2)}, 5, 0)
