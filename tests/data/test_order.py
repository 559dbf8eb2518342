"""Order: permutations, pure in (seed, epoch), pinned for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dla_train.data.order import document_order, locate_step, row_order


@given(count=st.integers(0, 500), seed=st.integers(-(2**63), 2**63), epoch=st.integers(0, 10**6))
def test_every_order_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    for order in (document_order, row_order):
        assert np.array_equal(np.sort(order(count, seed, epoch)), np.arange(count))


def test_order_is_pure_and_differs_by_seed_epoch_and_stream() -> None:
    base = document_order(100, 1, 2)
    assert np.array_equal(base, document_order(100, 1, 2))
    for other in (
        document_order(100, 2, 2),
        document_order(100, 1, 3),
        row_order(100, 1, 2),
        document_order(100, 2, 1),
    ):
        assert not np.array_equal(base, other)


def test_order_is_pinned_so_that_old_runs_resume_on_the_same_rows() -> None:
    assert document_order(8, 0, 0).tolist() == [5, 3, 7, 6, 4, 1, 2, 0]
    assert row_order(8, 7, 3).tolist() == [5, 0, 2, 7, 3, 4, 1, 6]


def test_first_place_is_uniform_over_epochs() -> None:
    first = np.array([row_order(4, 0, epoch)[0] for epoch in range(2000)])
    assert np.abs(np.bincount(first, minlength=4) / 2000 - 0.25).max() < 0.04  # 4 standard deviations


@pytest.mark.parametrize(("step", "epoch", "first_row"), [(0, 0, 0), (2, 0, 8), (3, 1, 0), (3 * 10**9 + 1, 10**9, 4)])
def test_step_is_located_by_arithmetic(step: int, epoch: int, first_row: int) -> None:
    position = locate_step(step, rows=15, global_batch_rows=4)
    assert (position.epoch, position.first_row) == (epoch, first_row)


def test_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step=-1"):
        locate_step(-1, 10, 2)
