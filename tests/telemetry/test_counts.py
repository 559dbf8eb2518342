"""What is read off the memories of a model."""

from collections.abc import Callable

import pytest
import torch

from dla_train.config import Config
from dla_train.models.build import build_model
from dla_train.parallel.mesh import Mesh
from dla_train.telemetry import MemoryTelemetry

ONE_RANK = Mesh(rank=0, size=1, device=torch.device("cpu"), owns_group=False)


def counted(telemetry: MemoryTelemetry, model: torch.nn.Module) -> dict[str, float]:
    model(torch.arange(32).reshape(2, 16))
    telemetry.after_step()
    return telemetry.read()


def test_numbers_are_means_over_layers_heads_and_decisions(tiny: Callable[..., Config]) -> None:
    model = build_model(tiny("memory=fixed", "memory.interval_tokens=4"), "cpu")
    numbers = counted(MemoryTelemetry(model, ONE_RANK), model)
    # rows of 16 tokens, whose first decides nothing: boundaries at tokens 4, 8 and 12
    assert numbers["boundary_rate"] == pytest.approx(3 / 15)
    assert numbers["live_slots"] == pytest.approx((1 * 3 + 2 * 4 + 3 * 4 + 4 * 4) / 15)
    assert "tau" not in numbers


def test_counts_of_several_steps_add_up_and_a_read_empties_them(tiny: Callable[..., Config]) -> None:
    model = build_model(tiny("memory=fixed", "memory.interval_tokens=4"), "cpu")
    telemetry = MemoryTelemetry(model, ONE_RANK)
    for tokens in (torch.arange(4)[None], torch.arange(8)[None]):  # 0 and 1 boundaries in 10 decisions
        model(tokens)
        telemetry.after_step()
    assert telemetry.read()["boundary_rate"] == pytest.approx(1 / 10)
    assert telemetry.read() == {}


def test_dropped_counts_do_not_appear(tiny: Callable[..., Config]) -> None:
    model = build_model(tiny("memory=fixed", "memory.interval_tokens=4"), "cpu")
    telemetry = MemoryTelemetry(model, ONE_RANK)
    model(torch.arange(16)[None])
    telemetry.drop()
    model(torch.arange(4)[None])
    telemetry.after_step()
    assert telemetry.read()["boundary_rate"] == 0.0


def test_attention_has_no_memory_numbers(tiny: Callable[..., Config]) -> None:
    config = tiny("model.backbone=attention", "model.conv_width=0", "memory=none")
    model = build_model(config, "cpu")
    assert counted(MemoryTelemetry(model, ONE_RANK), model) == {}


def test_tau_is_steered_only_by_rate_control(tiny: Callable[..., Config]) -> None:
    for memory, moves in (("dla_rate", True), ("dla", False)):
        model = build_model(tiny(f"memory={memory}"), "cpu")
        tau = counted(MemoryTelemetry(model, ONE_RANK), model)["tau"]
        assert (tau != pytest.approx(0.6)) == moves
