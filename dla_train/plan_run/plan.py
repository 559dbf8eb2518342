"""The dry run itself: from a configuration, a layout and a target to everything that can be told beforehand."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dla_train.config import Config
from dla_train.models.cost import FlopCount, flops_per_token, parameter_count
from dla_train.plan_run.budget import Budget, budget
from dla_train.plan_run.layout import Check, Layout, checks, divides
from dla_train.plan_run.shape import LayerShape
from dla_train.plan_run.states import Weights
from dla_train.plan_run.target import Target
from dla_train.plan_run.traffic import Traffic, traffic


@dataclass(frozen=True)
class Speed:
    """What the stated MFU would give."""

    tokens_per_second: float
    """Of all ranks."""
    step_seconds: float
    tokens: int
    """Of the whole run."""
    days: float
    device_hours: float


@dataclass(frozen=True)
class Plan:
    """The result of a dry run."""

    name: str
    """Of the run."""
    context_tokens: int
    global_batch_rows: int
    micro_batches: int
    """Of one rank in a step."""
    layout: Layout
    target: Target
    device: str
    """`cuda` or `cpu`, from train.device or the target."""
    backend: str
    """Of the memory operations: `triton` or `torch`."""
    checks: tuple[Check, ...]
    parameters: int
    """Of the whole model."""
    flops: FlopCount
    """Of one token."""
    speed: Speed
    parameters_per_rank: int | None
    """None, as the memory and the traffic, where the layout does not divide the model."""
    memory: Budget | None
    traffic: Traffic | None

    @property
    def legal(self) -> bool:
        """Whether no rule is broken."""
        return not any(check.problem for check in self.checks)

    @property
    def fits(self) -> bool:
        """Whether a rank's memory is within the target's."""
        return self.memory is not None and self.memory.total <= self.target.device_gb * 1e9

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; bytes, tokens and seconds are whole or real numbers, absent parts null."""
        values = dataclasses.asdict(self)
        values["legal"], values["fits"] = self.legal, self.fits
        values["flops"] |= {"forward": self.flops.forward, "training": self.flops.training}
        if self.memory is not None:
            values["memory"]["total"] = self.memory.total
        if self.traffic is not None:
            values["traffic"]["total"] = self.traffic.total
        return values


def plan(config: Config, layout: Layout, target: Target) -> Plan:
    """Everything that can be told of a run before it starts; touches no file, device or process group."""
    found = checks(config, layout)
    device = target.device if config.train.device == "auto" else config.train.device
    chosen = config.memory.backend
    rank: dict[str, Any] = {"parameters_per_rank": None, "memory": None, "traffic": None}
    if divides(found):
        rank = _of_a_rank(config, layout, target)
    return Plan(
        name=config.name,
        context_tokens=config.data.context_tokens,
        global_batch_rows=config.train.global_batch_rows,
        micro_batches=layout.micro_batches(config),
        layout=layout,
        target=target,
        device=device,
        backend=("triton" if device == "cuda" else "torch") if chosen == "auto" else chosen,
        checks=tuple(found),
        parameters=parameter_count(config.model, config.memory),
        flops=flops_per_token(config.model, config.memory, config.data.context_tokens),
        speed=_speed(config, layout, target),
        **rank,
    )


def _of_a_rank(config: Config, layout: Layout, target: Target) -> dict[str, Any]:
    shape = LayerShape.of(config, layout, target)
    weights = parameter_count(shape.model, config.memory)
    given = Weights(weights, shape.largest_weight, layout.backward_passes(config))
    return {
        "parameters_per_rank": weights,
        "memory": budget(layout, shape, given, config),
        "traffic": traffic(config, layout, shape, weights),
    }


def _speed(config: Config, layout: Layout, target: Target) -> Speed:
    flops = flops_per_token(config.model, config.memory, config.data.context_tokens).training
    rate = target.mfu * target.peak_tflops * 1e12 * layout.world_size / flops
    step = config.train.global_batch_rows * config.data.context_tokens
    seconds = step * config.train.steps / rate
    return Speed(
        tokens_per_second=rate,
        step_seconds=step / rate,
        tokens=step * config.train.steps,
        days=seconds / 86400,
        device_hours=seconds * layout.world_size / 3600,
    )
