# mypy: disable-error-code="no-untyped-def"
"""Chunk operators of mamba2 in Triton, forward and backward (docs/dla.md section 5).

    mixing = (q k^T) * D      query = e^G q      key_end = e^(G_end - G) k

Nothing but decays differs between the heads that share a key, so one program serves HEADS of them: q k^T is made once,
and their gradients of q and k are summed where they arise. What is left is reading and writing: both kernels are bound
by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.backbones.decays_triton import (
    ChunkDecays,
    decay_table,
    end_decay,
    read_decay,
    same_segment,
    settings_of,
    visible,
)
from dla_kernels.launch import cdiv, dot_precision, launch


@triton.jit
def _scores(p_q, p_k, m_t, row, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T [C, C] float32 of the tokens from the pointers on, `row` elements apart; 0 where not m_t."""
    o_r = tl.arange(0, C).to(tl.int64) * row
    b_s = tl.zeros([C, C], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        b_q = tl.load(p_q + o_r[:, None] + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_kt = tl.load(p_k + o_r[None, :] + o_k[:, None], mask=m_t[None, :] & m_k[:, None], other=0.0)
        b_s = tl.dot(b_q, b_kt, b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def _of_segment(p_segment, i_o, C: tl.constexpr):
    """Pointer to a chunk's segments, or None."""
    if p_segment is None:
        return None
    else:
        return p_segment + i_o * C


@triton.jit(do_not_specialize=["T", "H", "HK", "N", "BLOCKS"])
def mamba2_operators_kernel(
    p_q, p_k, p_start, p_cum, p_end, p_segment, p_decay, p_mixing, p_query_closed, p_query_open, p_key_end, scale,
    T, H, HK, N, BLOCKS,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Operators of one chunk for HEADS heads of one key head. Grid: B * N * HK * BLOCKS."""
    i_p = tl.program_id(0).to(tl.int64)
    i_block = i_p % BLOCKS
    i_hk = (i_p // BLOCKS) % HK
    i_n = (i_p // BLOCKS // HK) % N
    i_b = i_p // BLOCKS // HK // N
    heads = tl.minimum(HEADS, H // HK - i_block * HEADS)
    i_first = ((i_b * H + i_hk * (H // HK) + i_block * HEADS) * N + i_n) * C
    o_c = tl.arange(0, C)
    m_t = i_n * C + o_c < T
    row = HK * K
    p_q += ((i_b * T + i_n * C) * HK + i_hk) * K
    p_k += ((i_b * T + i_n * C) * HK + i_hk) * K
    b_s = _scores(p_q, p_k, m_t, row, K, C, BK, PRECISION) * scale
    m_sees = visible(p_start + i_b * T, i_n, T, C)
    for i in range(heads):
        i_o = i_first + tl.cast(i, tl.int64) * N * C
        b_m = b_s * decay_table(p_cum + i_o, p_end + i_o, _of_segment(p_segment, i_o, 1), m_sees, C)
        o_m = i_o * C + o_c[:, None] * C + o_c[None, :]
        tl.store(p_mixing + o_m, b_m.to(p_mixing.dtype.element_ty))
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        o_in = o_c.to(tl.int64)[:, None] * row + o_k[None, :]
        b_q = tl.load(p_q + o_in, mask=m_t[:, None] & m_k, other=0.0).to(tl.float32) * scale
        b_k = tl.load(p_k + o_in, mask=m_t[:, None] & m_k, other=0.0).to(tl.float32)
        for i in range(heads):
            i_o = i_first + tl.cast(i, tl.int64) * N * C
            o_out = i_o * K + o_c[:, None] * K + o_k[None, :]
            b_read = read_decay(p_cum + i_o, _of_segment(p_segment, i_o, 1), p_decay + i_o // C, C)
            b_end = end_decay(p_cum + i_o, p_end + i_o, C)
            tl.store(p_query_open + o_out, (b_read[:, None] * b_q).to(p_query_open.dtype.element_ty), mask=m_k)
            tl.store(p_key_end + o_out, (b_end[:, None] * b_k).to(p_key_end.dtype.element_ty), mask=m_k)
            if p_query_closed is not None:
                tl.store(p_query_closed + o_out, b_q.to(p_query_closed.dtype.element_ty), mask=m_k)
