"""Gated DeltaNet backbone (Yang et al., arXiv 2412.06464): S <- e^g (I - b k k^T) S + b k v^T, o = q^T S / sqrt(K).

q and k are L2-normalised per head after convolution and SiLU, b = sigmoid, g = -exp(A_log) softplus(a + dt_bias).
Value heads may outnumber key heads. The output norm is per head with one weight [V] for all heads, as published:
under a split of heads its gradient is a partial sum and has to be added over ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dla_kernels import gated_rms_norm, l2_normalize
from dla_train.config import ModelConfig
from dla_train.models.backbone import Decay, Projected, ShortConv, StateInputs, split_dims, split_heads
from dla_train.models.linear import Linear, exact, no_decay, wide_dtype
from dla_train.parallel.axes import Axes
from dla_train.parallel.sections import local_model


class GatedHeadNorm(nn.Module):
    """RMSNorm(read) * weight * silu(gate) per head."""

    def __init__(self, value_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = no_decay(nn.Parameter(torch.empty(value_dim)))
        self.eps = eps

    def forward(self, read: Tensor, gate: Tensor) -> Tensor:
        """read [B, T, H, V], gate [B, T, H*V] -> [B, T, H*V] in gate's dtype."""
        normed = gated_rms_norm(read, split_heads(gate, read.shape[-2]), exact(self.weight), self.eps)
        return normed.flatten(-2).to(gate.dtype)


class GatedDeltaNet(nn.Module):
    """Projections, decay, write strength and output stage of a Gated DeltaNet mixer."""

    def __init__(self, model: ModelConfig, axes: Axes) -> None:
        """Sizes are this rank's part of the whole `model`."""
        super().__init__()
        model = local_model(model, axes.tensor.size)
        self.key_dim, self.value_dim = model.key_dim, model.value_dim
        self.norm_eps = model.qk_norm_eps
        self.scale = model.key_dim**-0.5
        self.conv_dims: tuple[int, ...] = (model.key_dim, model.key_dim, model.value_dim)
        keys, values = model.num_key_heads * model.key_dim, model.num_heads * model.value_dim
        self.q = Linear(model.width, keys)
        self.k = Linear(model.width, keys)
        self.v = Linear(model.width, values)
        self.a = Linear(model.width, model.num_heads)
        self.b = Linear(model.width, model.num_heads)
        self.gate = Linear(model.width, values)
        channels = {"q": keys, "k": keys, "v": values}
        self.conv = ShortConv(channels, model.conv_width, axes.context, bias=model.conv_bias)
        self.decay = Decay(model.num_heads, axes.context)
        self.norm = GatedHeadNorm(model.value_dim, model.norm_eps)
        self.out = Linear(values, model.width)

    def project(self, hidden: Tensor) -> Projected:
        """hidden [B, T, D] -> projections."""
        return Projected(
            (self.q(hidden), self.k(hidden), self.v(hidden)), self.a(hidden), self.b(hidden), self.gate(hidden)
        )

    def state_inputs(self, mixed: tuple[Tensor, ...], projected: Projected) -> StateInputs:
        """Convolved q, k, v -> unit q and k, v, decay and write strength."""
        assert projected.write_input is not None
        q, k = (l2_normalize(split_dims(x, self.key_dim), added=self.norm_eps) for x in mixed[:2])
        _, log_decay = self.decay(projected.decay_input)
        beta = projected.write_input.to(wide_dtype(projected.write_input.dtype)).sigmoid()
        return StateInputs(q, k, split_dims(mixed[2], self.value_dim), log_decay, beta, None)

    def output(self, read: Tensor, skip: Tensor | None, projected: Projected) -> Tensor:
        """read [B, T, H, V] -> [B, T, D]; `skip` is not used."""
        return self.out(self.norm(read, projected.gate))
