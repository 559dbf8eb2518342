# mypy: disable-error-code="no-untyped-def"
"""Chunk operators of gated_deltanet in Triton (docs/dla.md section 5), from the inverse X of inverse_triton.py.

    T = X diag(beta)      A = (q k^T) * D      mixing M = A T        D: decays; gam = e^G, end = e^(G_end - G)
    erase = (T diag(gam)) k                    query = gam q - (M diag(gam)) k
    key_end = (T^T diag(end)) k                restore = end k

Decays multiply the C x C factors, never the keys, so that products take keys as they came, exact to 16 bits. T comes
in two halves of 16 bits: rounded once it would cost a third of the accuracy of o, and three quarters of it where
neighbouring keys are almost equal. gated_backward_triton.py holds the gradients.
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
from dla_kernels.backbones.mamba2_triton import scores_of
from dla_kernels.launch import dot_precision, launch


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
    b_beta = tl.load(p_beta + (i_b * T + o_t) * H + i_h, mask=m_t, other=0.0).to(tl.float32)
    b_open = entered_open(p_segment, i_c, C)
    b_start = start_decay(p_cum, i_c, C) * b_open
    b_end = end_decay(p_left, i_c, C)

    b_a = scores_of(p_q + i_in, p_k + i_in, m_t, row, K, C, BK, PRECISION)
    b_a *= decay_table(p_cum, p_left, p_segment, i_c, visible(p_start + i_b * T, i_n, T, C), C) * scale
    b_t = tl.load(p_x + o_c[:, None] * C + o_c[None, :]) * b_beta[None, :]
    b_m = tl.dot(b_a, b_t, input_precision=PRECISION)
    tl.store(p_mixing + i_c * C * C + o_c[:, None] * C + o_c[None, :], b_m.to(dtype))
    b_m = (b_m * b_start[None, :]).to(dtype)
    b_t *= b_start[None, :]
    b_th = b_t.to(dtype)
    b_tl = (b_t - b_th.to(tl.float32)).to(dtype)
    b_e = tl.load(p_x + o_c[None, :] * C + o_c[:, None]) * b_beta[:, None] * b_end[None, :]
    b_eh = b_e.to(dtype)
    b_el = (b_e - b_eh.to(tl.float32)).to(dtype)
    b_read = read_decay(p_cum, p_segment, p_decay, i_c, C) * scale
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        o_in = i_in + o_c.to(tl.int64)[:, None] * row + o_k[None, :]
        o_out = i_c * C * K + o_c[:, None] * K + o_k[None, :]
        b_k = tl.load(p_k + o_in, mask=m_t[:, None] & m_k, other=0.0)
        b_erase = tl.dot(b_th, b_k, input_precision=PRECISION)
        b_key = tl.dot(b_eh, b_k, input_precision=PRECISION)
        if HALVES:
            b_erase = tl.dot(b_tl, b_k, b_erase)
            b_key = tl.dot(b_el, b_k, b_key)
        tl.store(p_erase + o_out, b_erase.to(dtype), mask=m_k)
        tl.store(p_key_end + o_out, b_key.to(dtype), mask=m_k)
        b_q = tl.load(p_q + o_in, mask=m_t[:, None] & m_k, other=0.0).to(tl.float32)
        b_query = b_read[:, None] * b_q - tl.dot(b_m, b_k, input_precision=PRECISION)
        tl.store(p_query_open + o_out, b_query.to(dtype), mask=m_k)
        if p_query_closed is not None:
            tl.store(p_query_closed + o_out, (scale * b_q).to(dtype), mask=m_k)
        b_restore = (b_end * b_open)[:, None] * b_k.to(tl.float32)
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
