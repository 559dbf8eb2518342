"""Distinct draws and blocks: legal in every row, and every outcome equally likely, however it was drawn."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_train.recall.tasks.drawing import SPARSE, block_starts, distinct
from tests.recall.tasks.bounds import within


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 40), st.integers(0, 2000), st.integers(0, 9))
def test_draws_are_distinct_and_in_range(rows: int, count: int, spare: int, seed: int) -> None:
    drawn = distinct(rows, count, count + spare, generator(seed))
    assert drawn.shape == (rows, count) and drawn.dtype == torch.int64
    for row in drawn.tolist():
        assert len(set(row)) == count and min(row) >= 0 and max(row) < count + spare


@pytest.mark.parametrize(("count", "population"), [(2, 5), (3, 4), (2, 2 * SPARSE), (2, 2 * SPARSE + 3)])
def test_every_ordered_draw_is_equally_likely_shuffled_or_redrawn(count: int, population: int) -> None:
    rows = 40_000
    found = Counter(map(tuple, distinct(rows, count, population, generator()).tolist()))
    outcomes = list(itertools.permutations(range(population), count))
    assert set(found) <= set(outcomes)
    assert [outcome for outcome in outcomes if not within(found[outcome], rows, 1 / len(outcomes))] == []


def test_a_draw_of_everything_is_a_permutation() -> None:
    assert distinct(3, 64, 64, generator()).sort(dim=1).values.tolist() == [list(range(64))] * 3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 5), st.integers(0, 60), st.integers(0, 9))
def test_blocks_neither_overlap_nor_leave_the_row(rows: int, count: int, width: int, spare: int, seed: int) -> None:
    tokens = count * width + spare
    starts = block_starts(rows, count, width, tokens, generator(seed))
    assert (starts >= 0).all() and (starts + width <= tokens).all()
    assert (starts.diff(dim=1) >= width).all()


def test_every_placement_of_blocks_is_equally_likely() -> None:
    rows = 40_000
    found = Counter(map(tuple, block_starts(rows, 2, 2, 7, generator()).tolist()))
    outcomes = [(a, b) for a in range(6) for b in range(6) if a + 2 <= b and b + 2 <= 7]
    assert set(found) == set(outcomes)
    assert [outcome for outcome in outcomes if not within(found[outcome], rows, 1 / len(outcomes))] == []
