"""Which targets only recall can know, and their losses by distance."""

import numpy as np
import pytest

from dla_train.diagnose.comparison import compare
from dla_train.diagnose.recalled import distance_ranges, means_by_distance, recall_distances
from dla_train.diagnose.scoring import Documents


def documents(*texts: list[int]) -> Documents:
    longest = max(map(len, texts))
    tokens = np.array([text + [0] * (longest - len(text)) for text in texts])
    return Documents(np.arange(len(texts)), tokens, np.array([len(text) for text in texts]))


def test_a_target_is_recalled_from_where_its_pair_stood_last():
    """1 2 came two tokens and then five tokens before; 2 3, 2 4 and 4 9 are new; 4 1 is new at first."""
    found = recall_distances(documents([1, 2, 1, 2, 3, 9, 9, 1, 2], [5, 6]))
    #           targets:              2  1  2  3  9  9  1  2
    assert found.tolist()[0] == [0, 0, 2, 0, 0, 0, 0, 5] and not found[1].any()


def test_a_pair_of_another_document_is_not_recalled_there_or_here():
    found = recall_distances(documents([1, 2, 7, 8, 1, 2, 7, 8], [3, 1, 2]))
    assert found[0].tolist() == [0, 0, 0, 0, 0, 4, 4]
    assert not found[1].any()


def test_what_fills_a_short_document_up_is_nothing():
    """Both are filled up, or end, with zeros; a pair of zeros counts where it is text."""
    found = recall_distances(documents([4, 5, 4, 5], [6], [8, 9, 1, 2, 3, 8, 9], [0, 0, 0, 0]))
    assert found[0].tolist() == [0, 0, 2, 0, 0, 0] and found[2].tolist() == [0, 0, 0, 0, 0, 5]
    assert found[3].tolist() == [0, 1, 1, 0, 0, 0] and not found[1].any()


def test_distances_are_those_of_a_search_by_hand():
    generator = np.random.default_rng(3)
    texts = [generator.integers(0, 7, length).tolist() for length in (40, 2, 33, 17)]
    found = recall_distances(documents(*texts))
    pairs = [list(zip(text, text[1:], strict=False)) for text in texts]
    for row, own in enumerate(pairs):
        others = {pair for other in range(len(texts)) if other != row for pair in pairs[other]}
        for place, pair in enumerate(own):
            before = [place - earlier for earlier in range(place) if own[earlier] == pair and pair not in others]
            assert found[row, place] == min(before, default=0)
    assert found.any()


@pytest.mark.parametrize("positions", [1, 2, 3, 64, 100])
def test_every_distance_is_in_one_doubling(positions):
    nothing, every, *doublings = distance_ranges(positions)
    assert nothing == (0, 1) and every == (1, max(positions, 2))
    distances = [distance for first, end in doublings for distance in range(first, end)]
    assert distances == list(range(*every)) and doublings[0] == (1, 2)


def test_the_mean_of_a_distance_is_over_its_targets():
    losses = np.array([[1.0, 2, 4, 8], [3, 5, np.nan, np.nan]])
    distances = np.array([[0, 1, 2, 3], [0, 0, 0, 0]])
    found = means_by_distance(losses, distances, [(0, 1), (1, 4), (2, 4)])
    np.testing.assert_array_equal(found, [[1, 14 / 3, 6], [4, np.nan, np.nan]])


def test_arms_that_differ_in_what_they_recall_differ_there_alone():
    text = documents([1, 2, 3, 1, 2, 3, 1, 2], [5, 6, 7, 5, 6, 7, 5, 6])
    distances = recall_distances(text)
    first = np.random.default_rng(0).normal(3, 1, distances.shape)
    second = np.where(distances > 0, first - 1.5, first)
    found = compare(
        {"a": first, "b": second}, distances, band_edges=[], lengths=[7], bins_per_doubling=1, confidence=0.95
    ).recalled
    by_range = dict(zip(found.ranges, found.differences["b"].mean, strict=True))
    assert by_range[0, 1] == 0 and by_range[1, 7] == by_range[2, 4] == pytest.approx(-1.5)
    assert np.isnan(by_range[1, 2]) and np.isnan(by_range[4, 7])
