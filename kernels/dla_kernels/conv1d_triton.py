"""Triton kernels of the short causal convolution, forward and backward (conv1d.py holds the operation).

y_t = silu(sum_j weight[:, W-1-j] x_{t-j}), j < W, in float32 whatever the input type. A program owns a tile of tokens
by channels and loads it once for each tap: neighbouring taps share all rows but one, which L1 serves. Backward
recomputes the sum before SiLU instead of keeping it, so that memory holds x alone, and takes the gradients of later
tokens from its own tile, shifted. The weight's gradient is summed by tile, over tiles in torch, always in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels import launch


@triton.jit
def _tap(p_x, p_history, o_t, o_c, m, back, i_b, T, near_start, C: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr):
    """x_(t - back) [BT, BC] in float32 where `m`; before the row it is the history's, or 0."""
    o_s = o_t - back
    m_x = m & (o_s >= 0)[:, None]
    b_x = tl.load(p_x + ((i_b * T + o_s) * ROW)[:, None] + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
    if p_history is not None:  # noqa: SIM102 (the outer condition is decided when the kernel is compiled)
        if near_start:
            m_h = m & (o_s < 0)[:, None]
            p_h = p_history + ((i_b * (W - 1) + W - 1 + o_s) * C)[:, None] + o_c[None, :]
            b_x += tl.load(p_h, mask=m_h, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _reaches(p_positions, o_t, m_t, back, i_b, T):
    """[BT] bool: token t exists and the tap `back` tokens before it lies in its document."""
    if p_positions is not None:
        m_t &= tl.load(p_positions + i_b * T + o_t, mask=m_t, other=0) >= back
    return m_t


@triton.jit
def _convolve(
    p_x, p_weight, p_positions, p_history, o_t, o_c, i_b, T, near_start,
    C: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The sum over taps before SiLU [BT, BC] at tokens o_t; unspecified where a token does not exist."""
    m_t = (o_t >= 0) & (o_t < T)
    m_c = o_c < C
    b_y = tl.zeros([BT, BC], tl.float32)
    for back in tl.static_range(W):
        m = _reaches(p_positions, o_t, m_t, back, i_b, T)[:, None] & m_c[None, :]
        b_w = tl.load(p_weight + o_c * W + W - 1 - back, mask=m_c, other=0.0).to(tl.float32)
        b_y += b_w[None, :] * _tap(p_x, p_history, o_t, o_c, m, back, i_b, T, near_start, C, W, ROW)
    return b_y


@triton.jit(do_not_specialize=["T"])
def short_conv_kernel(
    p_x, p_weight, p_positions, p_history, p_y, T,
    C: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, ACTIVATION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y [B, T, C] of one tile of tokens by channels. Grid: B * tiles of time * tiles of channels."""
    i_p = tl.program_id(0).to(tl.int64)
    i_c = i_p % tl.cdiv(C, BC)
    i_t = i_p // tl.cdiv(C, BC) % tl.cdiv(T, BT)
    i_b = i_p // tl.cdiv(C, BC) // tl.cdiv(T, BT)
    o_t = i_t * BT + tl.arange(0, BT)
    o_c = i_c * BC + tl.arange(0, BC)
    b_y = _convolve(
        p_x, p_weight, p_positions, p_history, o_t, o_c, i_b, T, i_t * BT < W - 1, C, W, ROW, BT, BC
    )  # fmt: skip
    if ACTIVATION:
        b_y *= tl.sigmoid(b_y)
    m = (o_t < T)[:, None] & (o_c < C)[None, :]
    tl.store(p_y + ((i_b * T + o_t) * C)[:, None] + o_c[None, :], b_y, mask=m)


@triton.jit(do_not_specialize=["T", "N"])
def short_conv_backward_kernel(
    p_dy, p_x, p_weight, p_positions, p_history, p_dx, p_dweight, p_dhistory, T, N,
    C: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, ACTIVATION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx [B, T, C], dhistory [B, W-1, C] and one tile's part of dweight [B * N, W, C]. Grid: B * N * channel tiles.

    A tile needs the gradients before SiLU of the W-1 tokens after it too, so a program computes BT of them and writes
    BT - W + 1 rows. The history is the row's first W-1 inputs: its tiles begin there.
    """
    i_p = tl.program_id(0).to(tl.int64)
    i_c = i_p % tl.cdiv(C, BC)
    i_bt = i_p // tl.cdiv(C, BC)
    i_t = i_bt % N
    i_b = i_bt // N
    begin = i_t * (BT - W + 1)
    if p_history is not None:
        begin -= W - 1
    o_r = tl.arange(0, BT)
    o_t = begin + o_r
    o_c = i_c * BC + tl.arange(0, BC)
    m_t = (o_t >= 0) & (o_t < T)
    m_c = o_c < C
    m = m_t[:, None] & m_c[None, :]
    near_start = begin < W - 1

    b_d = tl.load(p_dy + ((i_b * T + o_t) * C)[:, None] + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    if ACTIVATION:
        b_y = _convolve(p_x, p_weight, p_positions, p_history, o_t, o_c, i_b, T, near_start, C, W, ROW, BT, BC)
        b_share = tl.sigmoid(b_y)
        b_d *= b_share * (1.0 + b_y * (1.0 - b_share))

    m_own = o_r < BT - W + 1
    b_dx = tl.zeros([BT, BC], tl.float32)
    for back in tl.static_range(W):
        m_b = _reaches(p_positions, o_t, m_t, back, i_b, T)
        b_to = tl.where(m_b[:, None], b_d, 0.0)
        m_x = (m_b & m_own)[:, None] & m_c[None, :]
        b_x = _tap(p_x, p_history, o_t, o_c, m_x, back, i_b, T, near_start, C, W, ROW)
        tl.store(p_dweight + (i_bt * W + W - 1 - back) * C + o_c, tl.sum(b_to * b_x, 0), mask=m_c)
        b_w = tl.load(p_weight + o_c * W + W - 1 - back, mask=m_c, other=0.0).to(tl.float32)
        if back > 0:
            o_ahead = tl.minimum(o_r + back, BT - 1)
            b_to = tl.gather(b_to, tl.broadcast_to(o_ahead[:, None], [BT, BC]), 0)
        b_dx += b_w[None, :] * b_to
    m = m_own[:, None] & m_c[None, :]
    tl.store(p_dx + ((i_b * T + o_t) * C)[:, None] + o_c[None, :], b_dx, mask=m & m_t[:, None])
    if p_history is not None:
        p_h = p_dhistory + ((i_b * (W - 1) + W - 1 + o_t) * C)[:, None] + o_c[None, :]
        tl.store(p_h, b_dx, mask=m & (o_t < 0)[:, None])


def forward(x: Tensor, weight: Tensor, positions: Tensor | None, history: Tensor | None, activation: bool) -> Tensor:
    """y [B, T, C] contiguous in x's dtype, of checked inputs."""
    batch, tokens, channels = x.shape
    x = _dense_channels(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    settings = launch.tuning("short_conv", x.device)
    tiles = launch.cdiv(tokens, settings["BT"]) * launch.cdiv(channels, settings["BC"])
    launch.launch(
        short_conv_kernel,
        (batch * tiles,),
        x,
        weight.contiguous(),
        None if positions is None else positions.contiguous(),
        _as_rows(history),
        y,
        tokens,
        C=channels,
        W=weight.shape[1],
        ROW=x.stride(1),
        ACTIVATION=activation,
        **settings,
    )
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, positions: Tensor | None, history: Tensor | None, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [B, T, C], dweight [C, W], dhistory [B, C, W-1] or [0] where there is no history), in their own dtypes."""
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    x = _dense_channels(x)
    settings = launch.tuning("short_conv_backward", x.device)
    blocks = launch.cdiv(tokens + (width - 1 if history is not None else 0), settings["BT"] - width + 1)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = torch.empty(batch * blocks, width, channels, dtype=torch.float32, device=x.device)
    dhistory = None
    if history is not None:
        dhistory = torch.empty(batch, width - 1, channels, dtype=history.dtype, device=x.device)
    launch.launch(
        short_conv_backward_kernel,
        (batch * blocks * launch.cdiv(channels, settings["BC"]),),
        dy.contiguous(),
        x,
        weight.contiguous(),
        None if positions is None else positions.contiguous(),
        _as_rows(history),
        dx,
        parts,
        dhistory,
        tokens,
        blocks,
        C=channels,
        W=width,
        ROW=x.stride(1),
        ACTIVATION=activation,
        **settings,
    )
    dweight = parts.sum(0).T.to(weight.dtype).contiguous()
    return dx, dweight, x.new_empty(0) if dhistory is None else dhistory.transpose(1, 2).contiguous()


def _dense_channels(x: Tensor) -> Tensor:
    """`x` [B, T, C] itself where it is a range of the channels of a wider contiguous tensor, else a copy."""
    row = x.stride(1)
    strided = x.stride(2) == 1 and row >= x.shape[2] and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * row)
    return x if strided else x.contiguous()


def _as_rows(history: Tensor | None) -> Tensor | None:
    """[B, C, W-1] -> [B, W-1, C]: rows like those of x, which it precedes."""
    return None if history is None else history.transpose(1, 2).contiguous()
