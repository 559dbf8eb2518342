"""Short causal depthwise convolution that never reads across a document start.

y_t = silu(sum_j weight[:, W-1-j] x_{t-j}), j < W, where a tap that would reach before its document reads 0. A few
shifted multiply-adds beat a grouped convolution call on CPU and take the document mask for free.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    positions: Tensor | None = None,
    history: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    """Convolve `x` [B, T, C] with `weight` [C, W] (last tap = the token itself) and apply SiLU: [B, T, C] in x's dtype.

    positions [B, T] int64: index of each token within its document, counting tokens already in `history`; None means
    one document a row from its first token. history [B, C, W-1]: the last inputs before the row, for a carried cache.
    """
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    if weight.shape[0] != channels:
        raise ValueError(f"weight has {weight.shape[0]} channels, x has {channels}; they must be equal")
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
    before = x.new_zeros(batch, width - 1, channels) if history is None else history.transpose(1, 2).to(x.dtype)
    return (
        torch.cat([before, x], dim=1)[:, -(width - 1) :].transpose(1, 2)
        if width > 1
        else x.new_zeros(batch, channels, 0)
    )
