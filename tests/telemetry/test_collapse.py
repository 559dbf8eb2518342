"""Which heads are named as collapsed, when, and how often."""

import logging

import pytest
import torch

from dla_train.parallel.axes import Axis
from dla_train.telemetry.collapse import LISTED, PATIENCE, CollapseWatch, heads_by_layer
from dla_train.telemetry.counts import placed_heads


def counts_of(rates: list[list[float]]) -> torch.Tensor:
    """[layers, H, 3] of these boundary rates among 1000 decisions."""
    boundaries = 1000 * torch.tensor(rates, dtype=torch.float64)
    return torch.stack([boundaries, torch.full_like(boundaries, 1000), torch.full_like(boundaries, 3000)], dim=-1)


def watched(watch: CollapseWatch, rates: list[list[float]], lines: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said in so many lines."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="dla_train"):
        for _ in range(lines):
            watch.watch(counts_of(rates))
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(("rate", "words"), [(0.001, "hardly any token"), (1.0, "nearly every token")])
def test_a_model_long_at_an_end_is_named_once(caplog: pytest.LogCaptureFixture, rate: float, words: str) -> None:
    watch = CollapseWatch()
    assert watched(watch, [[rate, rate], [rate, rate]], PATIENCE - 1, caplog) == []
    (said,) = watched(watch, [[rate, rate], [rate, rate]], PATIENCE + 1, caplog)
    assert words in said and "4 of 4 heads (layer 0: all heads; layer 1: all heads)" in said


def test_one_head_is_named_among_healthy_ones_and_others_when_they_follow(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch()
    (said,) = watched(watch, [[0.1, 0.0], [0.1, 0.1]], PATIENCE, caplog)
    assert "1 of 4 heads (layer 0: head 1)" in said
    assert watched(watch, [[0.1, 0.0], [0.1, 0.995]], PATIENCE - 1, caplog) == []
    (said,) = watched(watch, [[0.1, 0.0], [0.1, 0.995]], PATIENCE, caplog)
    assert "nearly every" in said and "1 of 4 heads (layer 1: head 1)" in said


def test_a_head_that_comes_back_in_time_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch()
    for rate in (0.0, 0.1, 0.0):
        assert watched(watch, [[rate]], PATIENCE - 1, caplog) == []


def test_a_head_without_decisions_is_not_collapsed(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch()
    with caplog.at_level(logging.WARNING, logger="dla_train"):
        for _ in range(PATIENCE):
            watch.watch(torch.zeros(1, 2, 3, dtype=torch.float64))
    assert caplog.records == []


def test_many_layers_are_not_all_listed() -> None:
    words = heads_by_layer(torch.tensor([[True, True, False]]).expand(LISTED + 2, 3))
    assert words.startswith("layer 0: heads 0, 1; layer 1") and words.endswith("; and 2 more layers")


def test_heads_of_tensor_ranks_are_placed_in_their_order() -> None:
    parts = [torch.full((1, 2, 3), float(rank + 1)) for rank in range(2)]
    placed = sum(placed_heads(part, Axis(rank, 2)) for rank, part in enumerate(parts))
    assert placed[0, :, 0].tolist() == [1, 1, 2, 2]
