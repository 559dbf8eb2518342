"""What is measured on: layer shapes, random inputs that open slots as text does, and thresholds by boundary rate.

A quarter of the tokens resemble the one before, the others nothing: at the paper's tau of 0.6 three of four tokens open
a slot, as on text. `tau_for_rate` finds the threshold at which one of ten does, as under a controlled rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dla_kernels import l2_normalize, plan_memory

REPEATED = 0.25
"""Share of tokens that resemble the one before."""
TAU = 0.6
"""The paper's threshold."""
CAPACITY_RULE = "mass"
"""Which pair merges, as the models have it."""
SPARSE_RATE = 0.1
"""Boundaries per token of the second regime."""


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of a measured layer."""

    backbone: str
    """`mamba2`, `gated_deltanet`, or `attention`."""
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int

    def __str__(self) -> str:
        return f"H {self.heads}, K {self.key_dim}, V {self.value_dim}"

    @property
    def scale(self) -> float:
        """Of the reads, as the models have it."""
        return 1.0 if self.backbone == "mamba2" else self.key_dim**-0.5


SHAPES = {
    "mamba2": Shape("mamba2", 48, 1, 128, 64),
    "gated_deltanet": Shape("gated_deltanet", 6, 6, 192, 384),
    "gated_deltanet_h16": Shape("gated_deltanet", 16, 16, 128, 128),
}
"""Layers of the paper's models at width 1536, and the shape that other kernels publish numbers for."""
ATTENTION = Shape("attention", 16, 16, 96, 96)
"""The paper's Transformer at width 1536."""
TOY_SHAPES = {
    "mamba2": Shape("mamba2", 4, 1, 16, 8),
    "gated_deltanet": Shape("gated_deltanet", 2, 2, 8, 16),
    "gated_deltanet_h16": Shape("gated_deltanet", 2, 2, 8, 8),
}
TOY_ATTENTION = Shape("attention", 2, 2, 8, 8)


@dataclass(frozen=True)
class LayerInputs:
    """q, k [B,T,Hk,K], v [B,T,H,V], log_decay and beta [B,T,H]; leaves where gradients are wanted."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None

    @property
    def keys(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What plan_memory takes."""
        return self.k, self.v, self.log_decay, self.beta

    @property
    def tensors(self) -> list[Tensor]:
        """All of them that there are."""
        return [x for x in (self.q, *self.keys) if x is not None]

    def tokens(self, begin: int, end: int) -> LayerInputs:
        """Tokens begin .. end of every row."""
        q, k, v, log_decay = (x[:, begin:end] for x in (self.q, self.k, self.v, self.log_decay))
        return LayerInputs(q, k, v, log_decay, None if self.beta is None else self.beta[:, begin:end])


def layer_inputs(
    shape: Shape,
    batch: int,
    tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    gradients: bool = True,
) -> LayerInputs:
    """Random inputs of a layer, the same at every call on one device; log_decay and beta are float32 whatever dtype."""
    generator = torch.Generator(device).manual_seed(0)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=device)

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(batch, tokens, heads, dim, generator=generator, device=device)

    # A token that resembles the one before takes the place of the last token that did not, with a little noise.
    repeated = uniform(batch, tokens) < REPEATED
    source = torch.where(repeated, 0, torch.arange(tokens, device=device)).cummax(1).values
    row = torch.arange(batch, device=device)[:, None]

    def alike(x: Tensor) -> Tensor:
        return x[row, source] + 0.1 * x

    q, k = normal(shape.key_heads, shape.key_dim), alike(normal(shape.key_heads, shape.key_dim))
    v = alike(normal(shape.heads, shape.value_dim))
    log_decay = -0.05 * uniform(batch, tokens, shape.heads)
    beta = uniform(batch, tokens, shape.heads) if shape.backbone == "gated_deltanet" else None
    inputs = LayerInputs(l2_normalize(q).to(dtype), l2_normalize(k).to(dtype), v.to(dtype), log_decay, beta)
    for x in inputs.tensors:
        x.requires_grad_(gradients)
    return inputs


def boundary_rate(inputs: LayerInputs, tau: float, backend: str | None) -> float:
    """Boundaries per token and head of `inputs` at a threshold; they do not depend on the capacity."""
    plan = plan_memory(*inputs.keys, tau=tau, capacity=30, backend=backend)
    return float(plan.boundary.float().mean())


def tau_for_rate(inputs: LayerInputs, rate: float, backend: str | None, *, steps: int = 12) -> float:
    """The threshold at which `rate` of the tokens open a slot, by bisection: fewer do, the higher it is."""
    low, high = 0.0, 2.0
    for _ in range(steps):
        tau = (low + high) / 2
        if boundary_rate(inputs, tau, backend) > rate:
            low = tau
        else:
            high = tau
    return (low + high) / 2
