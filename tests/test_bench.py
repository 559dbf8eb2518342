"""The measuring program: what it measures and how it writes it down."""

import pytest
import torch

from dla_train.bench import BACKBONES, SMALL, Timing, boundary_rate, layer_seconds, measure_in_turn, table


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_measured_layer_opens_slots_as_often_as_text_does(backbone):
    assert 0.7 < boundary_rate(backbone, SMALL) < 0.8


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
def test_a_layer_is_timed_with_and_without_gradients(backend):
    assert layer_seconds("gated_deltanet", 40, backend, backward=True) > 0
    assert layer_seconds("mamba2", 40, backend, backward=False) > 0
    assert torch.is_grad_enabled()


def test_things_are_timed_in_turn_and_the_first_round_is_not_counted():
    calls: list[str] = []

    def thing(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    timings = measure_in_turn({"a": lambda: thing("a"), "b": lambda: thing("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert timings["a"] == Timing([3.0, 5.0, 7.0]) and timings["b"].median == 6.0


def test_the_table_holds_every_number_and_its_target():
    results = {
        "environment": {"shape": "S", "torch": "2", "threads": 2, "python": "3"},
        "against_token_loop": {"mamba2, forward": {"ratio": 21.4, "boundary_rate": 0.75}},
        "growth_with_length": {"mamba2": {"ratios": {"4096/2048": 1.987}}},
        "trainer_overhead": {"median": 0.012, "least": 0.01, "most": 0.02, "steps": 9},
    }
    text = table(results)
    for part in ("| mamba2, forward | 0.75 | 21 | 20 |", "| mamba2, 4096/2048 | 1.99 | 2.2 |", "| 1.2% | 5% |"):
        assert part in text
