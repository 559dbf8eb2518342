"""Matrices and norms of the model: parameters stay float32 and are cast to the input's dtype where they are used.

There is no autocast: what runs in bfloat16 is exactly what is handed a bfloat16 input, and an optimizer always sees
the float32 parameter. Every parameter belongs to a module whose `forward` uses it, so that an engine which gathers
parameters by forward hooks (ZeRO stage 3) finds them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_kernels import rms_norm


def no_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter as one that weight decay must leave alone (read by optim.py); returns it."""
    parameter.no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


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
    """Token embedding `weight` [vocab, D], usable in both directions so that tying needs no aliased parameter."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, x: Tensor, *, dtype: torch.dtype = torch.float32, unembed: bool = False) -> Tensor:
        """tokens [...] int64 -> [..., D] in `dtype`; with `unembed`, [..., D] -> logits [..., vocab] in its dtype."""
        if unembed:
            return F.linear(x, self.weight.to(x.dtype))
        return F.embedding(x, self.weight).to(dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis with a learned `weight` [D], computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = no_decay(nn.Parameter(torch.empty(width)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D] in x's dtype."""
        return rms_norm(x, self.weight, self.eps)
