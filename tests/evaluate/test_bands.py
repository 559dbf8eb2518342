"""Bands of positions."""

import pytest
import torch

from dla_train.evaluate.bands import Bands


@pytest.mark.parametrize(
    ("context", "ranges"),
    [
        (16384, [(0, 1024), (1024, 4096), (4096, 8192), (8192, 16384)]),
        (32, [(0, 2), (2, 8), (8, 16), (16, 32)]),
        (5, [(0, 1), (1, 2), (2, 5)]),
        (1, [(0, 1)]),
    ],
)
def test_without_edges_there_are_bands_at_a_sixteenth_a_quarter_and_a_half(context, ranges):
    bands = Bands.of(context)
    assert bands.ranges == ranges and len(bands) == len(ranges)


def test_values_are_summed_in_the_band_of_their_position_edges_belonging_to_the_later_one():
    positions = torch.tensor([[0, 2, 3], [4, 5, 9]])
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    assert Bands.of(10, [3, 5]).sums(positions, values).tolist() == [3.0, 12.0, 48.0]
    assert Bands.of(10, [3, 5]).sums(positions, values).dtype == torch.float64


@pytest.mark.parametrize("edges", [[0, 4], [4, 4], [8, 4], [4, 16], [-1]])
def test_edges_that_do_not_rise_inside_the_context_are_refused(edges):
    with pytest.raises(ValueError, match="rise strictly between 0 and 16"):
        Bands.of(16, edges)
