"""RMSNorm and its gated form, in float32 whatever the input type (a bfloat16 mean of squares loses 3 digits)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype. weight [V] or None."""
    wide = x.to(_accumulation_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """rms_norm(x) * silu(gate): x, gate [..., V] -> [..., V] in x's dtype. Gated DeltaNet's order."""
    wide = _accumulation_dtype(x)
    y = rms_norm(x.to(wide), weight, eps) * F.silu(gate.to(wide))
    return y.to(x.dtype)


def l2_normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x / |x| over the last axis in x's dtype; a zero vector stays zero, with a zero gradient.

    The root is taken of max(|x|^2, eps): the usual sqrt(|x|^2) + eps has a NaN gradient at x = 0.
    """
    wide = x.to(_accumulation_dtype(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True).clamp_min(eps))).to(x.dtype)
