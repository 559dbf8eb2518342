"""Matrices and norms of the model: matrices are cast to the input's dtype where they are used, vectors stay float32.

There is no autocast: what runs in bfloat16 is exactly what is handed a bfloat16 input. Every parameter belongs to a
module whose `forward` uses it, so that an engine which gathers parameters by forward hooks (ZeRO stage 3) finds them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_kernels import rms_norm
from dla_train.parallel.axes import Axis
from dla_train.parallel.vocab import embed, padded_vocab


def no_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter as one that weight decay must leave alone (read by optim.py); returns it."""
    parameter.no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def exact(parameter: Tensor) -> Tensor:
    """A vector parameter in the precision it is optimised in, also where an engine stores parameters in bfloat16.

    Such an engine leaves the optimizer's float32 value in `parameter.exact`; the gradient goes to the parameter.
    Rounded to 8 bits, a decay, threshold or gain would stand still for thousands of steps and then jump.
    """
    value: Tensor | None = getattr(parameter, "exact", None)
    return parameter if value is None else value + (parameter - parameter.detach())


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of decays, norms and read weights for activations of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Module):
    """y = x W^T without a bias; `weight` [out, in]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Module):
    """Token embedding `weight` [rows, D], usable in both directions so that tying needs no aliased parameter.

    Under tensor parallelism a rank has a run of the (padded) vocabulary's rows.
    """

    def __init__(self, vocab_size: int, width: int, axis: Axis) -> None:
        super().__init__()
        self.vocab_size, self.axis = vocab_size, axis
        self.weight = nn.Parameter(torch.empty(padded_vocab(vocab_size, axis.size) // axis.size, width))

    def forward(
        self, x: Tensor, *, dtype: torch.dtype = torch.float32, unembed: bool = False, scatter_time: bool = False
    ) -> Tensor:
        """tokens [B, T] int64 -> [B, T, D] in `dtype`, with scatter_time this rank's slice along time; with `unembed`,
        [..., D] -> logits [..., rows] in its dtype."""
        if unembed:
            return F.linear(x, self.weight.to(x.dtype))
        return embed(x, self.weight, self.axis, self.vocab_size, dtype=dtype, scatter_time=scatter_time)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis with a learned `weight` [D], computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = no_decay(nn.Parameter(torch.empty(width)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D] in x's dtype."""
        return rms_norm(x, exact(self.weight), self.eps)
