"""Order: permutations, pure in (seed, epoch), pinned for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dla_train.data import order as order_module
from dla_train.data.order import document_order, grouped_order, place_order, row_order


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


@pytest.mark.parametrize("count", [1, 2, 1000, 70_000])
def test_order_is_the_sort_of_whole_hashes(count: int) -> None:
    hashes = order_module._hashes(0, count, order_module._key(5, 2, 1))
    assert np.array_equal(document_order(count, 5, 2), np.argsort(hashes))


def test_hashes_that_tie_in_the_sorted_bits_are_ordered_by_their_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 bits, 13 go to the index; hashes of 20 bits, whose lowest 13 are cut off, tie in long runs."""
    count, pieces = 5000, 700

    def short(x: np.ndarray) -> np.ndarray:
        return (x * np.uint64(2654435761) % np.uint64(1 << 20)) << np.uint64(3)

    monkeypatch.setattr(order_module, "_mix", short)
    monkeypatch.setattr(order_module, "_PIECE", pieces)  # ties lie across pieces too
    hashes = order_module._hashes(0, count, order_module._key(0, 0, 1))
    assert len(np.unique(hashes >> np.uint64(13))) < count / 4
    assert np.array_equal(hashes[document_order(count, 0, 0)], np.sort(hashes))


@given(groups=st.lists(st.integers(0, 9), min_size=0, max_size=300), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_grouped_order_sorts_by_group_and_loses_no_document(groups: list[int], seed: int, epoch: int) -> None:
    order = grouped_order(np.array(groups, dtype=np.uint32), seed, epoch)
    assert sorted(order.tolist()) == list(range(len(groups)))
    assert [groups[i] for i in order] == sorted(groups)


def test_grouped_order_shuffles_inside_groups_anew_every_epoch() -> None:
    groups = np.repeat([3, 7], 200)
    first, second = (grouped_order(groups, 0, epoch) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert np.corrcoef(first[:200], np.arange(200))[0, 1] < 0.3
    with pytest.raises(ValueError, match="too few bits"):
        grouped_order(np.array([1 << 48]), 0, 0)


def test_places_of_a_step_are_a_stream_of_their_own() -> None:
    assert place_order(8, 0, 0).tolist() == [3, 2, 1, 5, 4, 7, 0, 6]
    assert not np.array_equal(place_order(100, 0, 1), document_order(100, 0, 1))
