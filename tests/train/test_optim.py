"""Parameter groups and schedules."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dla_train.config import Config, MemoryConfig, OptimConfig
from dla_train.models.build import build_model
from dla_train.optim import build_optimizer, gate_temperature, learning_rate, parameter_groups, takes_weight_decay

COSINE = OptimConfig(lr=1.0, warmup_steps=10, schedule="cosine", final_lr_ratio=0.1)
WSD = OptimConfig(lr=1.0, warmup_steps=10, decay_steps=20, schedule="wsd", final_lr_ratio=0.1)
CONSTANT = OptimConfig(lr=1.0, warmup_steps=10, schedule="constant")


def test_every_parameter_is_in_exactly_one_group(tiny: Callable[..., Config]) -> None:
    model = build_model(tiny("memory.tau_control=learned"), "cpu")
    grouped = [id(parameter) for group in parameter_groups(model, 0.1) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_only_unmarked_matrices_decay(tiny: Callable[..., Config]) -> None:
    model = build_model(tiny("memory.tau_control=learned"), "cpu")
    decays = {name: takes_weight_decay(parameter) for name, parameter in model.named_parameters()}
    assert decays["embedding.weight"]
    for part in ("norm", "A_log", "dt_bias", "tau", "gain", "sharpness", "bias"):
        matching = {name: decay for name, decay in decays.items() if part in name}
        assert matching and not any(matching.values()), part
    marked = nn.Parameter(torch.ones(2, 2))
    marked.no_weight_decay = True
    assert not takes_weight_decay(marked)
    assert takes_weight_decay(nn.Parameter(torch.ones(2, 2)))
    assert not takes_weight_decay(nn.Parameter(torch.ones(2)))


def test_a_model_without_undecayed_parameters_has_one_group() -> None:
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


def test_one_optimizer_step_is_adamw_by_hand() -> None:
    layer = nn.Linear(2, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    optimizer = build_optimizer(layer, OptimConfig(lr=0.1, weight_decay=0.5))
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight, torch.full((1, 2), 2.0 * (1 - 0.1 * 0.5) - 0.1))  # first step: sign of g


def test_a_parameter_below_its_floor_is_put_back_on_it_and_may_rise_at_once() -> None:
    class Gained(nn.Module):
        non_negative = ("gain",)

        def __init__(self) -> None:
            super().__init__()
            self.gain, self.other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    module = Gained()
    optimizer = build_optimizer(module, OptimConfig(lr=0.1, weight_decay=0.5, beta1=0.0))
    push = torch.tensor([1.0, -1.0])  # the first of each down, the second up
    for _ in range(3):
        module.gain.grad, module.other.grad = push.clone(), push.clone()
        optimizer.step()
    torch.testing.assert_close(module.gain.detach(), torch.tensor([0.0, 0.3]))
    torch.testing.assert_close(module.other.detach(), torch.tensor([-0.3, 0.3]))
    module.gain.grad = torch.tensor([-1.0, -1.0])
    optimizer.step()
    torch.testing.assert_close(module.gain.detach(), torch.tensor([0.1, 0.4]))


@pytest.mark.parametrize(
    ("optim", "step", "expected"),
    [
        (COSINE, 1, 0.1),
        (COSINE, 10, 1.0),
        (COSINE, 55, 0.55),
        (COSINE, 100, 0.1),
        (WSD, 5, 0.5),
        (WSD, 80, 1.0),
        (WSD, 90, 0.55),
        (WSD, 100, 0.1),
        (CONSTANT, 5, 0.5),
        (CONSTANT, 100, 1.0),
    ],
)
def test_schedule_at_a_step_of_100(optim: OptimConfig, step: int, expected: float) -> None:
    assert learning_rate(optim, 100, step) == pytest.approx(expected)


@pytest.mark.parametrize("optim", [COSINE, WSD])
def test_after_warm_up_the_learning_rate_never_rises(optim: OptimConfig) -> None:
    rates = [learning_rate(optim, 100, step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_no_warm_up_and_a_warm_up_of_the_whole_run_both_work() -> None:
    assert learning_rate(dataclasses.replace(COSINE, warmup_steps=0), 100, 1) == pytest.approx(1.0, abs=1e-3)
    assert learning_rate(dataclasses.replace(COSINE, warmup_steps=100), 100, 100) == 1.0


def test_gate_temperature_goes_linearly_from_the_first_to_the_last_step() -> None:
    memory = MemoryConfig(gate_temperature=0.5, gate_temperature_final=0.1)
    assert [gate_temperature(memory, 5, step) for step in (1, 3, 5)] == pytest.approx([0.5, 0.3, 0.1])
    assert gate_temperature(memory, 1, 1) == 0.5
