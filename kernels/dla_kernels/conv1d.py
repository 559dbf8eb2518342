"""Short causal depthwise convolution that never reads across a document start.

y_t = silu(sum_j weight[:, W-1-j] x_{t-j}), j < W, where a tap that would reach before its document reads 0. In torch a
few shifted multiply-adds beat a grouped convolution call on CPU and take the document mask for free. In Triton it is
one custom operation, "dla::short_conv", which torch.compile keeps whole; torch code never passes through it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_kernels import launch


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    positions: Tensor | None = None,
    history: Tensor | None = None,
    activation: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Convolve `x` [B, T, C] with `weight` [C, W] (last tap = the token itself) and apply SiLU: [B, T, C] in x's dtype.

    positions [B, T] int64: index of each token within its document, counting tokens already in `history`; None means
    one document a row from its first token. history [B, C, W-1]: the last inputs before the row, for a carried cache.
    Differentiable in x, weight and history. backend: `triton` (float32 inside) or `torch` (in x's dtype), which
    `recurrent` means here too. Raises ValueError on shapes that do not fit.
    """
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    if weight.shape[0] != channels:
        raise ValueError(f"weight has {weight.shape[0]} channels, x has {channels}; they must be equal")
    if launch.resolve_backend(backend, x, weight) == "triton":
        _check_window(x, width, positions, history)
        y: Tensor = _short_conv(x, weight, positions, history, activation)
        return y
    before = x.new_zeros(batch, width - 1, channels) if history is None else history.transpose(1, 2).to(x.dtype)
    padded = torch.cat([before, x], dim=1)
    taps = weight.to(x.dtype)
    y = x * taps[:, -1]
    for back in range(1, width):
        shifted = padded[:, width - 1 - back : width - 1 - back + tokens]
        if positions is not None:
            shifted = shifted.masked_fill((positions < back)[..., None], 0.0)
        y = y + shifted * taps[:, width - 1 - back]
    return F.silu(y) if activation else y


def conv_window(x: Tensor, width: int, *, history: Tensor | None = None) -> Tensor:
    """The last `width`-1 inputs of `x` [B, T, C], oldest first: [B, C, width-1], zero (or `history`) before the row.

    Taps that lie before the last document are masked by `positions` when the window is used, so no reset is needed
    here.
    """
    batch, _, channels = x.shape
    kept = width - 1
    if kept < 1:
        return x.new_zeros(batch, channels, 0)
    before = x.new_zeros(batch, kept, channels) if history is None else history.transpose(1, 2).to(x.dtype)
    # A copy: a view would keep the whole row alive for as long as the cache.
    return torch.cat([before, x[:, -kept:]], dim=1)[:, -kept:].transpose(1, 2).contiguous()


def _check_window(x: Tensor, width: int, positions: Tensor | None, history: Tensor | None) -> None:
    """A kernel would read past what is too small, where torch raises by itself."""
    batch, tokens, channels = x.shape
    if positions is not None and positions.shape != (batch, tokens):
        raise ValueError(f"positions {tuple(positions.shape)} must be [B, T] = {(batch, tokens)}")
    if history is not None and history.shape != (batch, channels, width - 1):
        raise ValueError(f"history {tuple(history.shape)} must be [B, C, W-1] = {(batch, channels, width - 1)}")


def _forward(x: Tensor, weight: Tensor, positions: Tensor | None, history: Tensor | None, activation: bool) -> Tensor:
    from dla_kernels.conv1d_triton import forward

    return forward(x, weight, positions, history, activation)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, positions: Tensor | None, history: Tensor | None, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from dla_kernels.conv1d_triton import backward

    return backward(dy, x, weight, positions, history, activation)


_short_conv = torch.library.custom_op(
    "dla::short_conv",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? positions, Tensor? history, bool activation) -> Tensor",
)
_short_conv_backward = torch.library.custom_op(
    "dla::short_conv_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? positions, Tensor? history, bool activation)"
    " -> (Tensor, Tensor, Tensor)",
)


# Without storage the operations have their results' shapes alone, but a recording wants their launches.
@_short_conv.register_fake
def _(x: Tensor, weight: Tensor, positions: Tensor | None, history: Tensor | None, activation: bool) -> Tensor:
    if launch._recording is not None:
        return _forward(x, weight, positions, history, activation)
    return x.new_empty(x.shape)


@_short_conv_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, positions: Tensor | None, history: Tensor | None, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if launch._recording is not None:
        return _backward(dy, x, weight, positions, history, activation)
    dhistory = x.new_empty(0) if history is None else history.new_empty(history.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dhistory


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, positions, history, ctx.activation = inputs
    ctx.save_for_backward(x, weight, positions, history)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, positions, history = ctx.saved_tensors
    dx, dweight, dhistory = _short_conv_backward(dy, x, weight, positions, history, ctx.activation)
    return dx, dweight, None, None if history is None else dhistory, None


_short_conv.register_autograd(_differentiate, setup_context=_keep)
