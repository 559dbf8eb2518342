# mypy: disable-error-code="no-untyped-def"
"""Chunk operators of gated_deltanet in Triton (docs/dla.md section 5), from the inverse X of inverse_triton.py.

    T = X diag(beta)      A = (q k^T) * D      mixing M = A T        D: decays; gam = e^G, end = e^(G_end - G)
    erase = (T diag(gam)) k                    query = gam q - (M diag(gam)) k
    key_end = (T^T diag(end)) k                restore = end k

Decays multiply the C x C factors, never the keys, so that products take keys as they came, exact in 16 bits. T comes
in two halves of 16 bits, and A T is a product of 32 bits: rounded once each, they raised o's error in bfloat16 from
2.3e-3 to 3.9e-3, and to 7.8e-3 where neighbouring keys are almost equal. gated_backward_triton.py has the gradients.
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
    entered_open,
    read_decay,
    settings_of,
    start_decay,
    visible,
)
from dla_kernels.backbones.inverse_triton import load_beta
from dla_kernels.backbones.mamba2_triton import scores_of
from dla_kernels.launch import dot_precision, launch


@triton.jit
def _apply_to_keys(
    p_out, b_table, p_k, m_t, row, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store table k [C, K] of a float32 table [C, C]."""
    o_c = tl.arange(0, C)
    b_high = b_table.to(p_k.dtype.element_ty)
    b_low = (b_table - b_high.to(tl.float32)).to(p_k.dtype.element_ty)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        o_in = o_c.to(tl.int64)[:, None] * row + o_k[None, :]
        b_k = tl.load(p_k + o_in, mask=m_t[:, None] & m_k, other=0.0)
        b_out = tl.dot(b_high, b_k, input_precision=PRECISION)
        if HALVES:
            b_out = tl.dot(b_low, b_k, b_out)
        tl.store(p_out + o_c[:, None] * K + o_k[None, :], b_out.to(p_out.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=["T", "H", "HK", "N"])
def gated_operators_kernel(
    p_q, p_k, p_beta, p_start, p_cum, p_left, p_segment, p_decay, p_x,
    p_mixing, p_query_closed, p_query_open, p_key_end, p_erase, p_restore, scale, T, H, HK, N,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Operators of one chunk and head a program. HALVES: inputs have 16 bits, T comes in two."""
    i_p = tl.program_id(0).to(tl.int64)
    i_h = i_p % H
    i_n = (i_p // H) % N
    i_b = i_p // H // N
    i_c = (i_b * H + i_h) * N + i_n
    dtype = p_k.dtype.element_ty
    o_c = tl.arange(0, C)
    o_t = i_n * C + o_c
    m_t = o_t < T
    row = HK * K
    i_in = ((i_b * T + i_n * C) * HK + i_h // (H // HK)) * K
    p_x += i_c * C * C
    p_beta += (i_b * T + o_t) * H + i_h
    o_tile = o_c[:, None] * C + o_c[None, :]

    b_start = load_beta(p_beta, m_t) * start_decay(p_cum, i_c, C) * entered_open(p_segment, i_c, C)
    b_t = tl.load(p_x + o_tile) * b_start[None, :]
    _apply_to_keys(p_erase + i_c * C * K, b_t, p_k + i_in, m_t, row, K, C, BK, HALVES, PRECISION)
    b_t = tl.load(p_x + o_c[None, :] * C + o_c[:, None]) * load_beta(p_beta, m_t)[:, None]
    b_t *= end_decay(p_left, i_c, C)[None, :]
    _apply_to_keys(p_key_end + i_c * C * K, b_t, p_k + i_in, m_t, row, K, C, BK, HALVES, PRECISION)

    b_a = scores_of(p_q + i_in, p_k + i_in, m_t, row, K, C, BK, PRECISION)
    b_a *= decay_table(p_cum, p_left, p_segment, i_c, visible(p_start + i_b * T, i_n, T, C), C) * scale
    b_m = tl.dot(b_a, tl.load(p_x + o_tile), input_precision=PRECISION)
    b_m *= load_beta(p_beta, m_t)[None, :]
    tl.store(p_mixing + i_c * C * C + o_tile, b_m.to(dtype))
    b_open = entered_open(p_segment, i_c, C)
    b_m = (b_m * (start_decay(p_cum, i_c, C) * b_open)[None, :]).to(dtype)
    b_open *= end_decay(p_left, i_c, C)
    b_read = read_decay(p_cum, p_segment, p_decay, i_c, C) * scale
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        o_in = i_in + o_c.to(tl.int64)[:, None] * row + o_k[None, :]
        o_out = i_c * C * K + o_c[:, None] * K + o_k[None, :]
        b_k = tl.load(p_k + o_in, mask=m_t[:, None] & m_k, other=0.0)
        b_q = tl.load(p_q + o_in, mask=m_t[:, None] & m_k, other=0.0).to(tl.float32)
        b_query = b_read[:, None] * b_q - tl.dot(b_m, b_k, input_precision=PRECISION)
        tl.store(p_query_open + o_out, b_query.to(dtype), mask=m_k)
        if p_query_closed is not None:
            tl.store(p_query_closed + o_out, (scale * b_q).to(dtype), mask=m_k)
        b_restore = b_open[:, None] * b_k.to(tl.float32)
        tl.store(p_restore + o_out, b_restore.to(dtype), mask=m_k)


def gated_operators(
    q: Tensor, k: Tensor, beta: Tensor, document_start: Tensor, decays: ChunkDecays, inverse: Tensor, scale: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """mixing [B,H,N,C,C], query_closed (None: as query_open), query_open, key_end, erase and restore [B,H,N,C,K].

    All in q's dtype. q, k [B,T,Hk,K], beta [B,T,H], document_start [B,T] int32 and inverse X [B,H,N,C,C] contiguous.
    """
    _, tokens, key_heads, key_dim = k.shape
    batch, heads, chunks, chunk = decays.cum.shape
    mixing = q.new_empty(batch, heads, chunks, chunk, chunk)
    query, key_end, erase, restore = (q.new_empty(batch, heads, chunks, chunk, key_dim) for _ in range(4))
    closed = None if decays.segment is None else torch.empty_like(query)
    launch(
        gated_operators_kernel, (batch * chunks * heads,),
        q, k, beta, document_start, decays.cum, decays.left, decays.segment, decays.decay, inverse,
        mixing, closed, query, key_end, erase, restore, scale, tokens, heads, key_heads, chunks,
        K=key_dim, C=chunk, HALVES=q.dtype != torch.float32, PRECISION=dot_precision(q.dtype),
        **settings_of("gated_operators", q.device, chunk, key_dim),
    )  # fmt: skip
    return mixing, closed, query, key_end, erase, restore
