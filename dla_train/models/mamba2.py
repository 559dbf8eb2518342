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
from dla_train.models.backbone import Decay, Projected, ShortConv, StateInputs, split_dims
from dla_train.models.linear import Linear, exact, no_decay, wide_dtype
from dla_train.parallel.axes import Axes, Axis
from dla_train.parallel.regions import total
from dla_train.parallel.sections import local_model


class SkipGatedNorm(nn.Module):
    """y = read + D x, then RMSNorm(y silu(z)) * weight by group of heads."""

    def __init__(self, num_heads: int, groups: int, value_dim: int, eps: float, spread: Axis) -> None:
        """`spread`: the ranks that share one group of heads (a group of one where groups do not cross ranks)."""
        super().__init__()
        self.groups, self.spread = groups, spread
        self.eps = eps
        self.D = no_decay(nn.Parameter(torch.empty(num_heads)))
        self.weight = no_decay(nn.Parameter(torch.empty(num_heads * value_dim)))

    def forward(self, read: Tensor, skip: Tensor, gate: Tensor) -> Tensor:
        """read, skip [B, T, H, V], gate [B, T, H*V] -> [B, T, H*V] in gate's dtype."""
        wide = wide_dtype(gate.dtype)
        y = read.to(wide) + exact(self.D)[:, None] * skip.to(wide)
        gated = y.flatten(-2) * F.silu(gate.to(wide))
        normed = self._normalized(gated.unflatten(-1, (self.groups, -1))).flatten(-2)
        return (normed * exact(self.weight)).to(gate.dtype)

    def _normalized(self, x: Tensor) -> Tensor:
        """RMSNorm over the last axis, which other ranks of `spread` have more of."""
        if self.spread.size == 1:
            return rms_norm(x, None, self.eps)
        squares = total(x.square().sum(-1, keepdim=True), self.spread)
        return x * torch.rsqrt(squares / (x.shape[-1] * self.spread.size) + self.eps)


class Mamba2(nn.Module):
    """Projections, decay and output stage of a Mamba-2 mixer."""

    def __init__(self, model: ModelConfig, axes: Axes) -> None:
        """Sizes are this rank's part of the whole `model`."""
        super().__init__()
        spread = axes.tensor if model.num_key_heads == 1 else Axis.single()
        model = local_model(model, axes.tensor.size)
        self.key_dim, self.value_dim = model.key_dim, model.value_dim
        self.scale = 1.0
        self.conv_dims: tuple[int, ...] = (model.value_dim, model.key_dim, model.key_dim)
        inner, state = model.num_heads * model.value_dim, model.num_key_heads * model.key_dim
        self.z = Linear(model.width, inner)
        self.x = Linear(model.width, inner)
        self.B = Linear(model.width, state)
        self.C = Linear(model.width, state)
        self.dt = Linear(model.width, model.num_heads)
        self.conv = ShortConv(
            {"x": inner, "B": state, "C": state}, model.conv_width, axes.context, bias=model.conv_bias
        )
        self.decay = Decay(model.num_heads, axes.context)
        self.norm = SkipGatedNorm(model.num_heads, model.num_key_heads, model.value_dim, model.norm_eps, spread)
        self.out = Linear(inner, model.width)

    def project(self, hidden: Tensor) -> Projected:
        """hidden [B, T, D] -> projections."""
        return Projected((self.x(hidden), self.B(hidden), self.C(hidden)), self.dt(hidden), None, self.z(hidden))

    def state_inputs(self, mixed: tuple[Tensor, ...], projected: Projected) -> StateInputs:
        """Convolved x, B, C -> q = C, k = B, v = dt x."""
        x, k, q = (
            split_dims(mixed[0], self.value_dim),
            split_dims(mixed[1], self.key_dim),
            split_dims(mixed[2], self.key_dim),
        )
        dt, log_decay = self.decay(projected.decay_input)
        v = (dt[..., None] * x).to(x.dtype)
        return StateInputs(q, k, v, log_decay, None, x)

    def output(self, read: Tensor, skip: Tensor | None, projected: Projected) -> Tensor:
        """read, skip [B, T, H, V] -> [B, T, D]."""
        assert skip is not None
        return self.out(self.norm(read, skip, projected.gate))
