"""RMSNorm and its gated form, in float32 whatever the input type (a bfloat16 mean of squares loses 3 digits).

In Triton both are one custom operation, "dla::gated_rms_norm", with or without the gate, which torch.compile keeps
whole; torch code never passes through it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_kernels import launch


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, *, backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype. weight [V] or None.

    backend: `triton` or `torch`, which `recurrent` means here too.
    """
    if launch.resolve_backend(backend, x) == "triton":
        return _in_triton(x, None, weight, eps)
    return _rms_norm(x, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.to(_accumulation_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    """rms_norm(x) * silu(gate): x, gate [..., V] -> [..., V] in x's dtype. Gated DeltaNet's order.

    backend as in rms_norm. In Triton raises ValueError unless x and gate have one shape.
    """
    if launch.resolve_backend(backend, x, gate) == "triton":
        return _in_triton(x, gate, weight, eps)
    wide = _accumulation_dtype(x)
    y = _rms_norm(x.to(wide), weight, eps) * F.silu(gate.to(wide))
    return y.to(x.dtype)


def l2_normalize(x: Tensor, eps: float = 1e-12, *, added: float = 0.0) -> Tensor:
    """x / |x| over the last axis in x's dtype; a zero vector stays zero, with a zero gradient.

    The root is taken of max(|x|^2, eps): the usual sqrt(|x|^2) + eps has a NaN gradient at x = 0. `added` goes to
    |x|^2 first, as in implementations that divide by sqrt(|x|^2 + 1e-6).
    """
    wide = x.to(_accumulation_dtype(x))
    return (wide * torch.rsqrt((wide.square().sum(-1, keepdim=True) + added).clamp_min(eps))).to(x.dtype)


def _in_triton(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """A kernel would read past what is too small, where torch broadcasts or raises by itself."""
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and x {tuple(x.shape)} must have one shape")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} must be [V] = {tuple(x.shape[-1:])}")
    y: Tensor = _gated_rms_norm(x, gate, weight, eps)
    return y


def _forward(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    from dla_kernels.norm_triton import forward

    return forward(x, gate, weight, eps)


def _backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from dla_kernels.norm_triton import backward

    return backward(dy, x, gate, weight, eps)


_gated_rms_norm = torch.library.custom_op(
    "dla::gated_rms_norm",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? gate, Tensor? weight, float eps) -> Tensor",
)
_gated_rms_norm_backward = torch.library.custom_op(
    "dla::gated_rms_norm_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? gate, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)",
)


# Without storage the operations have their results' shapes alone, but a recording wants their launches.
@_gated_rms_norm.register_fake
def _(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    if launch._recording is not None:
        return _forward(x, gate, weight, eps)
    return x.new_empty(x.shape)


@_gated_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if launch._recording is not None:
        return _backward(dy, x, gate, weight, eps)
    dgate, dweight = (x.new_empty(0) if like is None else like.new_empty(like.shape) for like in (gate, weight))
    return x.new_empty(x.shape), dgate, dweight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, weight, ctx.eps = inputs
    ctx.save_for_backward(x, gate, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, weight = ctx.saved_tensors
    dx, dgate, dweight = _gated_rms_norm_backward(dy, x, gate, weight, ctx.eps)
    return dx, None if gate is None else dgate, None if weight is None else dweight, None


_gated_rms_norm.register_autograd(_differentiate, setup_context=_keep)
