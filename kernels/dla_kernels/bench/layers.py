"""The measured layers ("arms"): dynamic memory, its baselines, fla's kernels and softmax attention, all on one shape.

A layer is what stands between a model's projections and its output stage. `training` is the forward pass that a
gradient follows (soft boundary gates); without it a layer runs as in evaluation (hard boundaries, no gradients kept).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dla_kernels import (
    boundary_gate,
    boundary_score,
    content_read_weights,
    dla_attention,
    log_linear_levels,
    plan_memory,
    slot_affinity,
)
from dla_kernels.bench.inputs import CAPACITY_RULE, LayerInputs, Shape
from dla_kernels.bench.measure import brief

CAPACITIES = (30, 8)
"""K of the dynamic memories."""
LOG_LINEAR_SLOTS = 18
"""Slots and levels of our log_linear: enough for 128K tokens, and the same for all lengths, as kernels are compiled for
them."""
GATE_TEMPERATURE = 0.1
SHARPNESS = 8.0
"""Of content reading, as the models are initialised."""


@dataclass(frozen=True)
class Arm:
    """Which layer: a family, and for dynamic memory its settings."""

    family: str
    """`dla`, `single`, `log_linear`, `fla_single`, `fla_log_linear`, `flash_attention`."""
    capacity: int = 0
    closed_slots: str = "transition"
    read: str = "content"

    @property
    def name(self) -> str:
        """As in records and on the command line."""
        return f"dla_k{self.capacity}_{self.closed_slots}_{self.read}" if self.family == "dla" else self.family


def core_arms() -> list[Arm]:
    """What the targets compare: the default dynamic memory, and everything it is compared with."""
    families = ("single", "log_linear", "fla_single", "fla_log_linear", "flash_attention")
    return [*(Arm("dla", capacity) for capacity in CAPACITIES), *(Arm(family) for family in families)]


def variant_arms() -> list[Arm]:
    """Every other setting of the dynamic memory."""
    settings = [(closed, read) for closed in ("transition", "frozen") for read in ("content", "slot")]
    return [Arm("dla", capacity, *setting) for setting in settings[1:] for capacity in CAPACITIES]


class Layer(Protocol):
    """Something that maps its inputs to o [B, T, H, V]."""

    leaves: list[Tensor]
    """What gradients are taken of."""

    def forward(self, training: bool) -> Tensor:
        """One forward pass."""
        ...


@dataclass
class MemoryLayer:
    """A memory policy on a recurrent backbone."""

    arm: Arm
    shape: Shape
    inputs: LayerInputs
    tau: float
    backend: str | None
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        batch, tokens = self.inputs.v.shape[:2]
        self.capacity = {"dla": self.arm.capacity, "single": 1, "log_linear": LOG_LINEAR_SLOTS}[self.arm.family]
        device, heads = self.inputs.v.device, self.shape.heads
        generator = torch.Generator(device).manual_seed(1)
        weights = 0.5 + torch.rand(batch, tokens, heads, self.capacity, generator=generator, device=device)
        self.weights = weights.requires_grad_(self.inputs.v.requires_grad)
        self.gain = torch.ones(heads, device=device, requires_grad=weights.requires_grad)
        self.sharpness = torch.full((heads,), SHARPNESS, device=device, requires_grad=weights.requires_grad)
        self.leaves = [*self.inputs.tensors, self.weights]
        if self._by_content:
            self.leaves += [self.gain, self.sharpness]

    @property
    def _by_content(self) -> bool:
        return self.arm.family == "dla" and self.arm.read == "content"

    def forward(self, training: bool) -> Tensor:
        at: dict[str, Any] = {}
        for stage in self.stages(training, at).values():
            stage()
        o: Tensor = at["o"]
        return o

    def stages(self, training: bool, at: dict[str, Any]) -> dict[str, Callable[[], None]]:
        """The parts of a forward pass, to be called in this order; `at` is given the plan and o, among others.

        Whatever an operation derives from the plan and keeps with it is paid by the first that needs it.
        """
        at |= {"read": self.weights, "gates": None, "affinity": None}
        q, k, v = self.inputs.q, self.inputs.k, self.inputs.v
        gated = training and self.arm.family == "dla"

        def plan() -> None:
            at["plan"] = plan_memory(
                *self.inputs.keys,
                tau=self.tau,
                capacity=self.capacity,
                policy=self.arm.family,
                capacity_rule=CAPACITY_RULE,
                score_gradients=gated,
                backend=self.backend,
            )

        def affinity() -> None:
            if self._by_content:
                at["affinity"] = slot_affinity(q, k, at["plan"], backend=self.backend)

        def weights() -> None:
            if at["affinity"] is not None:
                at["read"] = content_read_weights(
                    self.weights, at["affinity"], gain=self.gain, sharpness=self.sharpness, backend=self.backend
                )
            if self.arm.family == "log_linear":
                levels = log_linear_levels(at["plan"].positions, self.capacity, self.capacity)
                at["read"] = self.weights.gather(-1, levels[:, :, None].expand(self.weights.shape))
            if gated:
                score = boundary_score(k, v, at["plan"])
                at["gates"] = boundary_gate(score, at["plan"], tau=self.tau, temperature=GATE_TEMPERATURE)

        def mixing() -> None:
            at["o"] = dla_attention(
                q,
                *self.inputs.keys,
                read_weights=at["read"],
                plan=at["plan"],
                closed_slots=self.arm.closed_slots,
                scale=self.shape.scale,
                gates=at["gates"],
                backend=self.backend,
            )

        return {"plan": plan, "affinity": affinity, "weights": weights, "mixing": mixing}


def levels_for(tokens: int) -> int:
    """Levels of a Fenwick partition of `tokens` tokens."""
    return max(tokens - 1, 1).bit_length() + 1


class FlaSingle:
    """fla's chunk kernels of the single-state backbone: simple_gla for mamba2, gated_delta_rule."""

    def __init__(self, shape: Shape, inputs: LayerInputs) -> None:
        self.shape, self.inputs, self.leaves = shape, inputs, inputs.tensors
        self.operations = fla_operations()

    def forward(self, training: bool) -> Tensor:
        x = self.inputs
        if x.beta is not None:
            rule = self.operations["gated_delta_rule"]
            return rule(q=x.q, k=x.k, v=x.v, g=x.log_decay, beta=x.beta, scale=self.shape.scale)[0]
        groups = self.shape.heads // self.shape.key_heads  # simple_gla knows no shared keys
        q, k = (t.repeat_interleave(groups, dim=2) for t in (x.q, x.k))
        return self.operations["simple_gla"](q=q, k=k, v=x.v, g=x.log_decay, scale=self.shape.scale)[0]


class FlaLogLinear:
    """fla's chunk_log_linear_attn, which there is for mamba2."""

    def __init__(self, shape: Shape, inputs: LayerInputs) -> None:
        if shape.backbone != "mamba2":
            raise ValueError("fla has no log-linear kernel of the gated delta rule")
        self.shape, self.inputs = shape, inputs
        batch, tokens, heads, _ = inputs.v.shape
        generator = torch.Generator(inputs.v.device).manual_seed(1)
        scales = 0.5 + torch.rand(batch, tokens, heads, levels_for(tokens), generator=generator, device=inputs.v.device)
        self.scales = scales.requires_grad_(inputs.v.requires_grad)
        self.leaves = [*inputs.tensors, self.scales]
        self.operation = fla_operations()["log_linear_attn"]

    def forward(self, training: bool) -> Tensor:
        x = self.inputs
        return self.operation(q=x.q, k=x.k, v=x.v, g=x.log_decay, level_scales=self.scales, scale=self.shape.scale)[0]


class FlashAttention:
    """Causal softmax attention by PyTorch's FlashAttention kernel, on q, k, v of its own."""

    def __init__(self, shape: Shape, batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.leaves = [
            torch.randn(batch, shape.heads, tokens, shape.key_dim, generator=generator, device=device)
            .to(dtype)
            .requires_grad_()
            for _ in range(3)
        ]

    def forward(self, training: bool) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            q, k, v = self.leaves
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)


FLA = {
    "simple_gla": "chunk_simple_gla",
    "gated_delta_rule": "chunk_gated_delta_rule",
    "log_linear_attn": "chunk_log_linear_attn",
}
"""Module of fla.ops -> its operation."""


def fla_operations() -> dict[str, Callable[..., tuple[Tensor, Any]]]:
    """fla's operations by module. Raises ImportError where fla is not installed."""
    return {module: getattr(importlib.import_module(f"fla.ops.{module}"), name) for module, name in FLA.items()}


def fla_state(device: torch.device) -> str:
    """fla's version, or why it is not measured."""
    if device.type != "cuda":
        return "not measured: its kernels need a CUDA device"
    try:
        fla_operations()
    except ImportError as error:
        return f"not measured: {brief(error)}"
    return str(getattr(importlib.import_module("fla"), "__version__", "of unknown version"))


def build_layer(
    arm: Arm, shape: Shape, inputs: LayerInputs, *, attention: Shape, tau: float, backend: str | None
) -> Layer:
    """The layer of an arm. Raises ValueError or ImportError where there is none."""
    if arm.family.startswith("fla_") and inputs.v.device.type != "cuda":
        raise ValueError("fla's kernels need a CUDA device")
    if arm.family == "fla_single":
        return FlaSingle(shape, inputs)
    if arm.family == "fla_log_linear":
        return FlaLogLinear(shape, inputs)
    if arm.family == "flash_attention":
        batch, tokens = inputs.v.shape[:2]
        return FlashAttention(attention, batch, tokens, inputs.v.dtype, inputs.v.device)
    return MemoryLayer(arm, shape, inputs, tau, backend)
