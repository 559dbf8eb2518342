"""What a recurrent backbone is: projections, (q, k, v, log_decay, beta) for the memory, output stage; and shared parts.

A backbone says how one state decays and is written (docs/dla.md, section 1) and knows nothing of slots, plans or
read weights; the memory is shared by all backbones (`recurrent.py`). Each projection is its own logical weight:
nothing is fused in a checkpoint, so heads can be split over ranks by slicing rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_kernels import conv_window, short_conv
from dla_train.models.context import to_heads
from dla_train.models.linear import exact, no_decay, wide_dtype
from dla_train.parallel.axes import Axis


@dataclass(frozen=True)
class Projected:
    """Linear projections of a mixer's input, before convolution."""

    conv_inputs: tuple[Tensor, ...]
    """[B, T, C_i] each: what passes the short convolution, in the order of the backbone's `conv`."""
    decay_input: Tensor
    """[B, T, H]: before dt_bias and softplus."""
    write_input: Tensor | None
    """[B, T, H]: before the sigmoid of the write strength; None for mamba2."""
    gate: Tensor
    """[B, T, H*V]: gate of the output norm, before SiLU."""


@dataclass(frozen=True)
class StateInputs:
    """What the memory consumes, one entry per token."""

    q: Tensor
    """[B, T, Hk, K]."""
    k: Tensor
    """[B, T, Hk, K]."""
    v: Tensor
    """[B, T, H, V]: what is written."""
    log_decay: Tensor
    """[B, T, H] float32, natural log, <= 0."""
    beta: Tensor | None
    """[B, T, H] float32 write strength in (0, 1), or None."""
    skip: Tensor | None
    """[B, T, H, V]: what a skip connection adds to the output, or None."""


class Backbone(Protocol):
    """One file per backbone implements this."""

    scale: float
    """Factor on q^T S."""
    conv: ShortConv
    """Convolutions of the projections."""
    conv_dims: tuple[int, ...]
    """Channels of one head in each of `Projected.conv_inputs`."""

    def project(self, hidden: Tensor) -> Projected:
        """hidden [B, T, D] -> projections."""
        ...

    def state_inputs(self, mixed: tuple[Tensor, ...], projected: Projected) -> StateInputs:
        """Convolved projections -> what the memory consumes."""
        ...

    def output(self, read: Tensor, skip: Tensor | None, projected: Projected) -> Tensor:
        """What was read [B, T, H, V], and the skip of the state inputs -> output [B, T, D]."""
        ...


class ShortConv(nn.Module):
    """Causal depthwise convolution of several projections, each with its own logical weight [C_i, W], and SiLU.

    With `bias` each has a bias [C_i] too. It is added outside the convolution's kernel, which has none. Without
    `activation` there is no SiLU.
    """

    def __init__(
        self, channels: dict[str, int], width: int, context: Axis, *, bias: bool = False, activation: bool = True
    ) -> None:
        super().__init__()
        self.width, self.context, self.bias, self.activation = width, context, bias, activation
        self.names, self.sizes = list(channels), list(channels.values())
        if width:
            for name, size in channels.items():
                self.register_parameter(name, nn.Parameter(torch.empty(size, width)))
                if bias:
                    self.register_parameter(f"bias_{name}", no_decay(nn.Parameter(torch.empty(size))))

    def forward(self, inputs: tuple[Tensor, ...], positions: Tensor, history: Tensor | None) -> tuple[Tensor, ...]:
        """inputs [B, T, C_i] each, positions [B, T], history [B, sum C_i, W-1] | None -> same shapes.

        Inputs may hold this context rank's part of the channels alone.
        """
        if not self.width:
            return tuple(F.silu(x) for x in inputs) if self.activation else inputs
        sizes = [x.shape[-1] for x in inputs]
        weight, x = self._joined("", sizes), torch.cat(inputs, dim=-1)
        fused = self.activation and not self.bias
        mixed = short_conv(x, weight, positions=positions, history=history, activation=fused)
        if self.bias:
            mixed = mixed + self._joined("bias_", sizes).to(mixed.dtype)
        if self.activation and not fused:
            mixed = F.silu(mixed)
        return tuple(mixed.split(sizes, dim=-1))

    def _joined(self, prefix: str, sizes: list[int]) -> Tensor:
        """Taps or biases of all projections, of the heads that the inputs hold."""
        own = (getattr(self, prefix + name) for name in self.names)
        return torch.cat([own_heads(exact(x), size, self.context) for x, size in zip(own, sizes, strict=True)])

    def window(self, inputs: tuple[Tensor, ...], history: Tensor | None) -> Tensor | None:
        """The inputs a later call needs, [B, sum C_i, W-1]; None where no tap reaches back."""
        if self.width < 2:
            return None
        return conv_window(torch.cat(inputs, dim=-1), self.width, history=history)


class Decay(nn.Module):
    """Step size and decay of a head: dt = softplus(input + dt_bias), log_decay = -exp(A_log) dt (Mamba-2's form)."""

    def __init__(self, num_heads: int, context: Axis) -> None:
        super().__init__()
        self.context = context
        self.A_log = no_decay(nn.Parameter(torch.empty(num_heads)))
        self.dt_bias = no_decay(nn.Parameter(torch.empty(num_heads)))

    def forward(self, decay_input: Tensor) -> tuple[Tensor, Tensor]:
        """decay_input [B, T, H] -> (dt, log_decay), both [B, T, H] float32."""
        wide, heads = wide_dtype(decay_input.dtype), decay_input.shape[-1]
        dt = F.softplus(decay_input.to(wide) + own_heads(exact(self.dt_bias), heads, self.context))
        return dt, -own_heads(exact(self.A_log), heads, self.context).to(wide).exp() * dt


def own_heads(parameter: Tensor, size: int, context: Axis) -> Tensor:
    """The `size` rows of `parameter` that belong to the heads a context rank has inside the mixer: all, or its part."""
    if parameter.shape[0] == size:
        return parameter
    return parameter.chunk(context.size)[context.rank]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads*dim] -> [B, T, heads, dim]."""
    return x.unflatten(-1, (heads, -1))


def split_dims(x: Tensor, dim: int) -> Tensor:
    """[B, T, heads*dim] -> [B, T, heads, dim], however many heads there are."""
    return x.unflatten(-1, (-1, dim))


def exchange_projected(projected: Projected, backbone: Backbone, context: Axis) -> Projected:
    """What the memory needs, of all tokens and this context rank's heads; the output gate stays with its tokens."""
    if context.size == 1:
        return projected
    parts = zip(projected.conv_inputs, backbone.conv_dims, strict=True)
    write = projected.write_input
    return Projected(
        conv_inputs=tuple(to_heads(split_dims(x, dim), context).flatten(-2) for x, dim in parts),
        decay_input=to_heads(projected.decay_input, context),
        write_input=None if write is None else to_heads(write, context),
        gate=projected.gate,
    )
