"""Triton kernels of RMSNorm and its gated form, forward and backward (norm.py holds the operations).

y = x / sqrt(mean(x^2) + eps) * weight * silu(gate) over the last axis, in float32 whatever the input type. A program
holds whole rows in registers, so one pass over memory serves the mean and the result; backward recomputes the mean
rather than keeping it. The weight's gradient is summed over a fixed number of stretches of rows, then in torch: always
in one order, on every GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels import launch


@triton.jit
def _normalized(p_x, o_n, o_v, eps, N, V: tl.constexpr):
    """(x / rms [BR, BV], 1 / rms [BR]) of rows o_n, both 0 and 1 where there is no row."""
    m = (o_n < N)[:, None] & (o_v < V)[None, :]
    b_x = tl.load(p_x + o_n[:, None] * V + o_v[None, :], mask=m, other=0.0).to(tl.float32)
    b_inverse = tl.rsqrt(tl.where(o_n < N, tl.sum(b_x * b_x, 1) / V + eps, 1.0))
    return b_x * b_inverse[:, None], b_inverse


@triton.jit(do_not_specialize=["eps", "N"])
def rms_norm_kernel(p_x, p_gate, p_weight, p_y, eps, N, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr):
    """y [N, V] for BR rows. Grid: tiles of rows."""
    o_n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    m = (o_n < N)[:, None] & m_v[None, :]
    b_y, _ = _normalized(p_x, o_n, o_v, eps, N, V)
    if p_weight is not None:
        b_y *= tl.load(p_weight + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    if p_gate is not None:
        b_gate = tl.load(p_gate + o_n[:, None] * V + o_v[None, :], mask=m, other=0.0).to(tl.float32)
        b_y *= b_gate * tl.sigmoid(b_gate)
    tl.store(p_y + o_n[:, None] * V + o_v[None, :], b_y, mask=m)


@triton.jit(do_not_specialize=["eps", "N", "TILES"])
def rms_norm_backward_kernel(
    p_dy, p_x, p_gate, p_weight, p_dx, p_dgate, p_dweight, eps, N, TILES,
    V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dx, dgate [N, V] of TILES * BR rows and their part of dweight [programs, V]. Grid: stretches of rows."""
    i_p = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    b_dweight = tl.zeros([BV], tl.float32)
    for i in range(TILES):
        o_n = (i_p * TILES + tl.cast(i, tl.int64)) * BR + tl.arange(0, BR)
        m = (o_n < N)[:, None] & m_v[None, :]
        o = o_n[:, None] * V + o_v[None, :]
        b_unit, b_inverse = _normalized(p_x, o_n, o_v, eps, N, V)
        b_d = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        if p_gate is not None:
            b_gate = tl.load(p_gate + o, mask=m, other=0.0).to(tl.float32)
            b_share = tl.sigmoid(b_gate)
            b_dgate = b_d * b_unit * b_share * (1.0 + b_gate * (1.0 - b_share))
            if p_weight is not None:
                b_dgate *= tl.load(p_weight + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
            tl.store(p_dgate + o, b_dgate, mask=m)
            b_d *= b_gate * b_share
        if p_weight is not None:
            b_dweight += tl.sum(b_d * b_unit, 0)
            b_d *= tl.load(p_weight + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
        b_dx = (b_d - b_unit * (tl.sum(b_d * b_unit, 1) / V)[:, None]) * b_inverse[:, None]
        tl.store(p_dx + o, b_dx, mask=m)
    if p_weight is not None:
        tl.store(p_dweight + i_p * V + o_v, b_dweight, mask=m_v)


def forward(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """y [..., V] contiguous in x's dtype, of checked inputs."""
    rows, dim, settings = _tiling("rms_norm", x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch.launch(
        rms_norm_kernel,
        (launch.cdiv(rows, settings["BR"]),),
        x.contiguous(),
        _contiguous(gate),
        _contiguous(weight),
        y,
        float(eps),
        rows,
        V=dim,
        **settings,
    )
    return y


def backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dgate [..., V], dweight [V]) in their own dtypes; [0] for what is None."""
    rows, dim, settings = _tiling("rms_norm_backward", x)
    tiles = launch.cdiv(rows, settings["BR"])
    each = max(1, launch.cdiv(tiles, settings.pop("PARTS")))
    programs = launch.cdiv(tiles, each)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate = x.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    parts = None if weight is None else torch.empty(programs, dim, dtype=torch.float32, device=x.device)
    launch.launch(
        rms_norm_backward_kernel,
        (programs,),
        dy.contiguous(),
        x.contiguous(),
        _contiguous(gate),
        _contiguous(weight),
        dx,
        None if gate is None else dgate,
        parts,
        float(eps),
        rows,
        each,
        V=dim,
        **settings,
    )
    dweight = x.new_empty(0) if weight is None or parts is None else parts.sum(0).to(weight.dtype)
    return dx, dgate, dweight


def _tiling(kernel: str, x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows, V, and the kernel's settings: as many rows a program as fill its BLOCK of values, at least one."""
    settings = launch.tuning(kernel, x.device)
    dim = x.shape[-1]
    settings["BV"] = launch.power_of_2(dim, 16)
    settings["BR"] = max(1, settings.pop("BLOCK") // settings["BV"])
    return x.numel() // max(dim, 1), dim, settings


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
