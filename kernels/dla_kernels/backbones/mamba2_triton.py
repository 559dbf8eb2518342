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
def scores_of(p_q, p_k, m_t, row, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
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
    i_first = (i_b * H + i_hk * (H // HK) + i_block * HEADS) * N + i_n
    o_c = tl.arange(0, C)
    m_t = i_n * C + o_c < T
    row = HK * K
    p_q += ((i_b * T + i_n * C) * HK + i_hk) * K
    p_k += ((i_b * T + i_n * C) * HK + i_hk) * K
    b_s = scores_of(p_q, p_k, m_t, row, K, C, BK, PRECISION) * scale
    m_sees = visible(p_start + i_b * T, i_n, T, C)
    o_tile = o_c[:, None] * C + o_c[None, :]
    for i in range(heads):
        i_c = i_first + tl.cast(i, tl.int64) * N
        b_m = b_s * decay_table(p_cum, p_end, p_segment, i_c, m_sees, C)
        tl.store(p_mixing + i_c * C * C + o_tile, b_m.to(p_mixing.dtype.element_ty))
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        o_in = o_c.to(tl.int64)[:, None] * row + o_k[None, :]
        b_q = tl.load(p_q + o_in, mask=m_t[:, None] & m_k, other=0.0).to(tl.float32) * scale
        b_k = tl.load(p_k + o_in, mask=m_t[:, None] & m_k, other=0.0).to(tl.float32)
        for i in range(heads):
            i_c = i_first + tl.cast(i, tl.int64) * N
            o_out = i_c * C * K + o_c[:, None] * K + o_k[None, :]
            b_read = read_decay(p_cum, p_segment, p_decay, i_c, C)
            b_end = end_decay(p_cum, p_end, i_c, C)
            tl.store(p_query_open + o_out, (b_read[:, None] * b_q).to(p_query_open.dtype.element_ty), mask=m_k)
            tl.store(p_key_end + o_out, (b_end[:, None] * b_k).to(p_key_end.dtype.element_ty), mask=m_k)
            if p_query_closed is not None:
                tl.store(p_query_closed + o_out, b_q.to(p_query_closed.dtype.element_ty), mask=m_k)


@triton.jit
def _scores_backward(
    p_q, p_k, p_start, p_cum, p_end, p_segment, p_d_mixing, p_d_cum, p_d_end, i_b, i_n, i_first, heads, row, m_t, scale,
    T, N, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d (q k^T) [C, C] of all heads; stores the share of mixing in each head's d_cum and d_end."""
    o_c = tl.arange(0, C)
    m_sees = visible(p_start + i_b * T, i_n, T, C)
    b_s = scores_of(p_q, p_k, m_t, row, K, C, BK, PRECISION)
    b_d = tl.zeros([C, C], tl.float32)
    for i in range(heads):
        i_c = i_first + tl.cast(i, tl.int64) * N
        b_dm = tl.load(p_d_mixing + i_c * C * C + o_c[:, None] * C + o_c[None, :]).to(tl.float32)
        b_dm *= decay_table(p_cum, p_end, p_segment, i_c, m_sees, C) * scale
        b_d += b_dm
        b_dm *= b_s
        m_same = same_segment(p_segment, i_c, C)
        b_rows = tl.sum(tl.where(m_same, b_dm, 0.0), 1)
        tl.store(p_d_cum + i_c * C + o_c, b_rows - tl.sum(b_dm, 0))
        tl.store(p_d_end + i_c * C + o_c, tl.sum(tl.where(m_same, 0.0, b_dm), 0))
    return b_d


@triton.jit(do_not_specialize=["T", "H", "HK", "N", "BLOCKS"])
def mamba2_backward_kernel(
    p_q, p_k, p_start, p_cum, p_end, p_segment, p_decay, p_d_mixing, p_d_query_closed, p_d_query_open, p_d_key_end,
    p_scores, p_d_cum, p_d_end, p_d_read, p_dq, p_dk, scale, T, H, HK, N, BLOCKS,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of dq and dk over HEADS heads of one key head [B, T, HK, BLOCKS, K], and the adjoints of the decays.

    Grid: B * N * HK * BLOCKS. p_scores [programs, C, C]: d (q k^T) on its way to being transposed.
    """
    i_p = tl.program_id(0).to(tl.int64)
    i_block = i_p % BLOCKS
    i_hk = (i_p // BLOCKS) % HK
    i_n = (i_p // BLOCKS // HK) % N
    i_b = i_p // BLOCKS // HK // N
    heads = tl.minimum(HEADS, H // HK - i_block * HEADS)
    i_first = (i_b * H + i_hk * (H // HK) + i_block * HEADS) * N + i_n
    o_c = tl.arange(0, C)
    m_t = i_n * C + o_c < T
    row = HK * K
    p_q += ((i_b * T + i_n * C) * HK + i_hk) * K
    p_k += ((i_b * T + i_n * C) * HK + i_hk) * K
    p_scores += i_p * C * C
    if p_d_mixing is not None:
        b_d = _scores_backward(
            p_q, p_k, p_start, p_cum, p_end, p_segment, p_d_mixing, p_d_cum, p_d_end, i_b, i_n, i_first, heads, row,
            m_t, scale, T, N, K, C, BK, PRECISION,
        )  # fmt: skip
        tl.store(p_scores + o_c[:, None] * C + o_c[None, :], b_d.to(p_scores.dtype.element_ty))
        tl.debug_barrier()
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        o_in = o_c.to(tl.int64)[:, None] * row + o_k[None, :]
        b_q = tl.load(p_q + o_in, mask=m_t[:, None] & m_k, other=0.0)
        b_k = tl.load(p_k + o_in, mask=m_t[:, None] & m_k, other=0.0)
        b_dq = tl.zeros([C, BK], tl.float32)
        b_dk = tl.zeros([C, BK], tl.float32)
        if p_d_mixing is not None:
            b_s = tl.load(p_scores + o_c[:, None] * C + o_c[None, :])
            b_st = tl.load(p_scores + o_c[None, :] * C + o_c[:, None])
            b_dq = tl.dot(b_s, b_k, b_dq, input_precision=PRECISION)
            b_dk = tl.dot(b_st, b_q, b_dk, input_precision=PRECISION)
        for i in range(heads):
            i_c = i_first + tl.cast(i, tl.int64) * N
            o_out = i_c * C * K + o_c[:, None] * K + o_k[None, :]
            # The first tile of K starts these sums, except where mixing's share lies there already.
            m_more = (o_c >= 0) & (i_k > 0)
            m_cum = m_more
            if p_d_mixing is not None:
                m_cum = o_c >= 0
            b_d_cum = tl.load(p_d_cum + i_c * C + o_c, mask=m_cum, other=0.0)
            b_d_end = tl.load(p_d_end + i_c * C + o_c, mask=m_cum, other=0.0)
            b_d_read = tl.load(p_d_read + i_c * C + o_c, mask=m_more, other=0.0)
            if p_d_query_open is not None:
                b_g = tl.load(p_d_query_open + o_out, mask=m_k, other=0.0).to(tl.float32)
                b_g *= scale * read_decay(p_cum, p_segment, p_decay, i_c, C)[:, None]
                b_dq += b_g
                b_d_read += tl.sum(b_g * b_q.to(tl.float32), 1)
            if p_d_query_closed is not None:
                b_dq += scale * tl.load(p_d_query_closed + o_out, mask=m_k, other=0.0).to(tl.float32)
            if p_d_key_end is not None:
                b_g = tl.load(p_d_key_end + o_out, mask=m_k, other=0.0).to(tl.float32)
                b_g *= end_decay(p_cum, p_end, i_c, C)[:, None]
                b_dk += b_g
                b_w = tl.sum(b_g * b_k.to(tl.float32), 1)
                b_d_cum -= b_w
                b_d_end += b_w
            tl.store(p_d_cum + i_c * C + o_c, b_d_cum)
            tl.store(p_d_end + i_c * C + o_c, b_d_end)
            tl.store(p_d_read + i_c * C + o_c, b_d_read)
        tl.debug_barrier()
        o_d = ((o_c.to(tl.int64)[:, None] * HK) * BLOCKS) * K + o_k[None, :]
        i_d = (((i_b * T + i_n * C) * HK + i_hk) * BLOCKS + i_block) * K
        tl.store(p_dq + i_d + o_d, b_dq.to(p_dq.dtype.element_ty), mask=m_t[:, None] & m_k)
        tl.store(p_dk + i_d + o_d, b_dk.to(p_dk.dtype.element_ty), mask=m_t[:, None] & m_k)


def mamba2_operators(
    q: Tensor, k: Tensor, document_start: Tensor, decays: ChunkDecays, scale: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """mixing [B,H,N,C,C], query_closed (None: as query_open), query_open and key_end [B,H,N,C,K] in q's dtype.

    q, k [B,T,Hk,K] and document_start [B,T] int32 contiguous.
    """
    batch, tokens, key_heads, key_dim = k.shape
    _, heads, chunks, chunk = decays.cum.shape
    mixing = q.new_empty(batch, heads, chunks, chunk, chunk)
    query = q.new_empty(batch, heads, chunks, chunk, key_dim)
    closed = None if decays.segment is None else torch.empty_like(query)
    key_end = torch.empty_like(query)
    settings = _settings("mamba2_operators", q, chunk, heads)
    blocks = cdiv(heads // key_heads, settings["HEADS"])
    launch(
        mamba2_operators_kernel, (batch * chunks * key_heads * blocks,),
        q, k, document_start, decays.cum, decays.end, decays.segment, decays.decay, mixing, closed, query, key_end,
        scale, tokens, heads, key_heads, chunks, blocks,
        K=key_dim, C=chunk, PRECISION=dot_precision(q.dtype), **settings,
    )  # fmt: skip
    return mixing, closed, query, key_end


def mamba2_backward(
    q: Tensor,
    k: Tensor,
    document_start: Tensor,
    decays: ChunkDecays,
    scale: float,
    d_mixing: Tensor | None,
    d_query_closed: Tensor | None,
    d_query_open: Tensor | None,
    d_key_end: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq and dk as q [B,T,Hk,K], and the adjoints of cum, end and the log of `read_decay` [B,H,N,C] float32."""
    batch, tokens, key_heads, key_dim = k.shape
    _, heads, chunks, chunk = decays.cum.shape
    settings = _settings("mamba2_backward", q, chunk, heads)
    blocks = cdiv(heads // key_heads, settings["HEADS"])
    programs = batch * chunks * key_heads * blocks
    shape = (batch, tokens, key_heads, blocks, key_dim)
    dq, dk = (q.new_empty(shape, dtype=q.dtype if blocks == 1 else torch.float32) for _ in range(2))
    d_cum, d_end, d_read = (torch.empty_like(decays.cum) for _ in range(3))
    launch(
        mamba2_backward_kernel, (programs,),
        q, k, document_start, decays.cum, decays.end, decays.segment, decays.decay,
        d_mixing, d_query_closed, d_query_open, d_key_end, q.new_empty(programs, chunk, chunk),
        d_cum, d_end, d_read, dq, dk, scale, tokens, heads, key_heads, chunks, blocks,
        K=key_dim, C=chunk, PRECISION=dot_precision(q.dtype), **settings,
    )  # fmt: skip
    dq, dk = (x.flatten(3).view_as(q) if blocks == 1 else x.sum(3).to(q.dtype) for x in (dq, dk))
    return dq, dk, d_cum, d_end, d_read


def _settings(kernel: str, q: Tensor, chunk: int, heads: int) -> dict[str, int]:
    settings = settings_of(kernel, q.device, chunk, q.shape[3])
    return settings | {"HEADS": min(settings["HEADS"], heads // q.shape[2])}
