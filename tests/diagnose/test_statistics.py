"""Means, intervals and sums against numbers worked out by hand and tables of Student's t."""

import math

import numpy as np
import pytest

from dla_train.diagnose.comparison import compare, default_lengths
from dla_train.diagnose.report import _cell
from dla_train.diagnose.statistics import (
    context_ranges,
    curve_ranges,
    document_means,
    means,
    position_sums,
)

NAN = math.nan


def no_recall(losses: np.ndarray) -> np.ndarray:
    """Distances of which nothing is recalled."""
    return np.zeros(losses.shape, dtype=np.int64)


def test_sums_by_position_are_in_float64_over_the_documents_that_have_a_target_there():
    losses = np.array([[1, 2, 3], [5, NAN, 7], [1e-4, 1, NAN]], dtype=np.float32)
    sums = position_sums(losses)
    assert sums.count.tolist() == [3, 2, 2] and sums.total.dtype == sums.squares.dtype == np.float64
    assert sums.total.tolist() == [6 + float(np.float32(1e-4)), 3, 10]
    assert sums.squares.tolist() == [26 + float(np.float32(1e-4)) ** 2, 5, 58]


def test_mean_and_variance_come_back_from_the_sums():
    losses = np.random.default_rng(0).normal(3, 1, (40, 6)).astype(np.float32)
    sums = position_sums(losses)
    mean = sums.total / sums.count
    variance = (sums.squares - sums.count * mean**2) / (sums.count - 1)
    np.testing.assert_allclose(mean, losses.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, losses.astype(np.float64).var(0, ddof=1), rtol=1e-9)


def test_a_mean_and_its_interval_by_hand():
    """1, 2, 6: mean 3, variance 7, standard error sqrt(7/3); t of 2 degrees is 4.3027."""
    found = means(np.array([[1.0], [2.0], [6.0]]), 0.95)
    half = 4.30265 * math.sqrt(7 / 3)
    assert found.mean.tolist() == [3] and found.documents.tolist() == [3]
    assert [found.low[0], found.high[0]] == pytest.approx([3 - half, 3 + half], rel=1e-5)


def test_documents_without_a_value_are_left_out_and_one_document_has_no_interval():
    found = means(np.array([[1.0, NAN, 4.0], [3.0, NAN, NAN]]), 0.95)
    assert found.documents.tolist() == [2, 0, 1]
    assert found.mean[0] == 2 and np.isnan(found.mean[1]) and found.mean[2] == 4
    assert np.isfinite(found.low[0]) and np.isnan(found.low[1:]).all() and np.isnan(found.high[1:]).all()


def test_a_document_counts_by_its_mean_over_the_positions_it_has():
    losses = np.array([[1, 2, 3, 6], [8, NAN, NAN, NAN]], dtype=np.float32)
    found = document_means(losses, [(0, 2), (1, 4), (3, 4)])
    np.testing.assert_array_equal(found, [[1.5, 11 / 3, 6], [8, NAN, NAN]])


def test_what_documents_have_in_common_cancels_in_pairs():
    """Documents differ by nats, the arms by 0.1 and 0.3: the interval of the difference knows only the latter."""
    base = np.array([[1.0], [4.0], [9.0]], dtype=np.float64)
    other = base + np.array([[0.1], [0.3], [0.2]])
    found = compare(
        {"a": base, "b": other}, no_recall(base), band_edges=[], lengths=[1], bins_per_doubling=1, confidence=0.95
    )
    difference = found.bands.differences["b"]
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert difference.mean[0] == pytest.approx(0.2)
    assert [difference.low[0], difference.high[0]] == pytest.approx([0.2 - half, 0.2 + half], rel=1e-5)
    arm = found.bands.arms["b"]
    assert arm.high[0] - arm.low[0] > 30 * (difference.high[0] - difference.low[0])


def test_an_arm_against_itself_differs_by_exactly_zero():
    losses = np.random.default_rng(1).normal(3, 1, (5, 300)).astype(np.float32)
    losses[3, 250:] = NAN
    lengths = default_lengths(300)
    found = compare(
        {"a": losses, "b": losses},
        no_recall(losses),
        band_edges=[],
        lengths=lengths,
        bins_per_doubling=4,
        confidence=0.95,
    )
    for quantity in (found.bands, found.curve, found.lengths, found.in_context):
        line = quantity.differences["b"]
        assert not line.mean.any() and not line.low.any() and not line.high.any()


def test_perplexity_by_length_is_the_exponential_of_the_mean_loss_of_that_many_tokens():
    losses = np.log(np.array([[2.0, 8.0, 4.0], [2.0, 8.0, 4.0]]))
    found = compare(
        {"a": losses, "b": losses + math.log(1.1)},
        no_recall(losses),
        band_edges=[],
        lengths=[1, 2, 3],
        bins_per_doubling=1,
        confidence=0.95,
    )
    perplexity = found.lengths.perplexity
    np.testing.assert_allclose(perplexity.arms["a"].mean, [2, 4, 4])
    np.testing.assert_allclose(perplexity.differences["b"].mean, [10, 10, 10])


def test_the_in_context_score_is_the_loss_early_less_the_loss_late():
    assert context_ranges(4000) == ((40, 60), (3500, 4000))
    assert context_ranges(400) == ((40, 60), (300, 400))
    assert context_ranges(100) is None
    losses = np.full((3, 400), 2.0)
    losses[:, 40:60], losses[:, 300:] = [[5.0], [6.0], [7.0]], 1.0
    found = compare(
        {"a": losses, "b": losses},
        no_recall(losses),
        band_edges=[],
        lengths=[400],
        bins_per_doubling=1,
        confidence=0.95,
    )
    assert found.in_context.arms["a"].mean.tolist() == [5]
    assert found.in_context.ranges == [(40, 60), (300, 400)]


@pytest.mark.parametrize("positions", [1, 2, 3, 7, 100, 512, 513, 16384])
@pytest.mark.parametrize("per_doubling", [1, 4])
def test_the_ranges_of_a_curve_cover_every_position_once_and_grow(positions, per_doubling):
    ranges = curve_ranges(positions, per_doubling)
    assert [p for first, end in ranges for p in range(first, end)] == list(range(positions))
    sizes = [end - first for first, end in ranges]
    assert all(b >= a / 2 for a, b in zip(sizes, sizes[1:], strict=False))


def test_a_cell_of_the_tables_says_no_interval_of_one_document():
    lines = means(np.array([[1.0, NAN, 4.0], [3.0, NAN, NAN]]), 0.95)
    assert [_cell(lines, place, "+") for place in range(3)] == ["+2.000 [-10.706, +14.706]", "-", "+4.000"]
