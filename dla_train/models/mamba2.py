"""Mamba-2 backbone (Dao and Gu 2024, arXiv 2405.21060): S <- e^{dt A} S + B (dt x)^T, y = C^T S + D x.

In the memory's names q = C, k = B, v = dt x, log_decay = -exp(A_log) dt, scale 1. z, x, B, C and dt are separate
logical weights. Heads of one group share B and C. The output norm is RMSNorm(y silu(z)) over the channels of one
group of heads, not over all heads: groups then split over ranks without communication; with one group it is the
published norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_kernels import rms_norm
from dla_train.config import ModelConfig
from dla_train.models.backbone import Decay, Projected, ShortConv, StateInputs, split_heads
from dla_train.models.linear import Linear, no_decay, wide_dtype


class SkipGatedNorm(nn.Module):
    """y = read + D x, then RMSNorm(y silu(z)) * weight by group of heads."""

    def __init__(self, num_heads: int, groups: int, value_dim: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.D = no_decay(nn.Parameter(torch.empty(num_heads)))
        self.weight = no_decay(nn.Parameter(torch.empty(num_heads * value_dim)))

    def forward(self, read: Tensor, skip: Tensor, gate: Tensor) -> Tensor:
        """read, skip [B, T, H, V], gate [B, T, H*V] -> [B, T, H*V] in gate's dtype."""
        wide = wide_dtype(gate.dtype)
        y = read.to(wide) + self.D[:, None] * skip.to(wide)
        gated = y.flatten(-2) * F.silu(gate.to(wide))
        normed = rms_norm(gated.unflatten(-1, (self.groups, -1)), None, self.eps).flatten(-2)
        return (normed * self.weight).to(gate.dtype)


class Mamba2(nn.Module):
    """Projections, decay and output stage of a Mamba-2 mixer."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups = model.num_heads, model.num_key_heads
        self.scale = 1.0
        inner, state = model.num_heads * model.value_dim, model.num_key_heads * model.key_dim
        self.z = Linear(model.width, inner)
        self.x = Linear(model.width, inner)
        self.B = Linear(model.width, state)
        self.C = Linear(model.width, state)
        self.dt = Linear(model.width, model.num_heads)
        self.conv = ShortConv({"x": inner, "B": state, "C": state}, model.conv_width)
        self.decay = Decay(model.num_heads)
        self.norm = SkipGatedNorm(model.num_heads, model.num_key_heads, model.value_dim, model.norm_eps)
        self.out = Linear(inner, model.width)

    def project(self, hidden: Tensor) -> Projected:
        """hidden [B, T, D] -> projections."""
        return Projected((self.x(hidden), self.B(hidden), self.C(hidden)), self.dt(hidden), None, self.z(hidden))

    def state_inputs(self, mixed: tuple[Tensor, ...], projected: Projected) -> StateInputs:
        """Convolved x, B, C -> q = C, k = B, v = dt x."""
        x, k, q = (
            split_heads(mixed[0], self.heads),
            split_heads(mixed[1], self.groups),
            split_heads(mixed[2], self.groups),
        )
        dt, log_decay = self.decay(projected.decay_input)
        v = (dt[..., None] * x).to(x.dtype)
        return StateInputs(q, k, v, log_decay, None, x)

    def output(self, read: Tensor, inputs: StateInputs, projected: Projected) -> Tensor:
        """read [B, T, H, V] -> [B, T, D]."""
        assert inputs.skip is not None
        return self.out(self.norm(read, inputs.skip, projected.gate))
