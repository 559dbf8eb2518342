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
    DecayAdjoints,
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
    p_q, p_k, p_start, p_cum, p_left, p_segment, p_decay, p_mixing, p_query_closed, p_query_open, p_key_end, scale,
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
        b_m = b_s * decay_table(p_cum, p_left, p_segment, i_c, m_sees, C)
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
            b_end = end_decay(p_left, i_c, C)
            tl.store(p_query_open + o_out, (b_read[:, None] * b_q).to(p_query_open.dtype.element_ty), mask=m_k)
            tl.store(p_key_end + o_out, (b_end[:, None] * b_k).to(p_key_end.dtype.element_ty), mask=m_k)
            if p_query_closed is not None:
                tl.store(p_query_closed + o_out, b_q.to(p_query_closed.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=["T", "H", "HK", "N", "BLOCKS"])
def mamba2_scores_backward_kernel(
    p_q, p_k, p_start, p_cum, p_left, p_segment, p_d_mixing, p_d_scores, p_d_cum, p_d_end, scale,
    T, H, HK, N, BLOCKS,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d (q k^T) [B, N, HK, BLOCKS, C, C], summed over HEADS heads, and what mixing gives the decays of each head.

    Grid: B * N * HK * BLOCKS.
    """
    i_p = tl.program_id(0).to(tl.int64)
    i_block = i_p % BLOCKS
    i_hk = (i_p // BLOCKS) % HK
    i_n = (i_p // BLOCKS // HK) % N
    i_b = i_p // BLOCKS // HK // N
    heads = tl.minimum(HEADS, H // HK - i_block * HEADS)
    i_first = (i_b * H + i_hk * (H // HK) + i_block * HEADS) * N + i_n
    i_in = ((i_b * T + i_n * C) * HK + i_hk) * K
    o_c = tl.arange(0, C)
    o_tile = o_c[:, None] * C + o_c[None, :]
    m_sees = visible(p_start + i_b * T, i_n, T, C)
    b_s = scores_of(p_q + i_in, p_k + i_in, i_n * C + o_c < T, HK * K, K, C, BK, PRECISION)
    b_d = tl.zeros([C, C], tl.float32)
    for i in range(heads):
        i_c = i_first + tl.cast(i, tl.int64) * N
        b_dm = tl.load(p_d_mixing + i_c * C * C + o_tile).to(tl.float32)
        b_dm *= decay_table(p_cum, p_left, p_segment, i_c, m_sees, C) * scale
        b_d += b_dm
        # An entry's own token reads it before it decays: its two shares would cancel but for their rounding.
        b_dm = tl.where(o_c[:, None] == o_c[None, :], 0.0, b_dm * b_s)
        m_same = same_segment(p_segment, i_c, C)
        b_rows = tl.sum(tl.where(m_same, b_dm, 0.0), 1)
        tl.store(p_d_cum + i_c * C + o_c, b_rows - tl.sum(b_dm, 0))
        tl.store(p_d_end + i_c * C + o_c, tl.sum(tl.where(m_same, 0.0, b_dm), 0))
    tl.store(p_d_scores + i_p * C * C + o_tile, b_d.to(p_d_scores.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "H", "HK", "N", "BLOCKS", "ENTRIES"])
def mamba2_input_backward_kernel(
    p_own, p_other, p_cum, p_left, p_segment, p_decay, p_d_scores, p_d_closed, p_d_decayed, p_d_log, p_d_own, scale,
    T, H, HK, N, BLOCKS, ENTRIES,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, HEADS: tl.constexpr, QUERY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d own [B, T, HK, BLOCKS, K], summed over HEADS heads: dq from the queries' gradients if QUERY, else dk from the
    keys'. p_d_log [tiles of K, B, H, N, C]: their share in the adjoint of the logarithm of what decays own.

    Grid: B * N * HK * BLOCKS * tiles of K. ENTRIES: B * H * N * C.
    """
    tiles: tl.constexpr = tl.cdiv(K, BK)
    i_p = tl.program_id(0).to(tl.int64) // tiles
    i_k = tl.program_id(0).to(tl.int64) % tiles
    i_block = i_p % BLOCKS
    i_hk = (i_p // BLOCKS) % HK
    i_n = (i_p // BLOCKS // HK) % N
    i_b = i_p // BLOCKS // HK // N
    heads = tl.minimum(HEADS, H // HK - i_block * HEADS)
    i_first = (i_b * H + i_hk * (H // HK) + i_block * HEADS) * N + i_n
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    o_t = i_b * T + i_n * C + o_c
    m_k = (o_k < K)[None, :]
    m_in = (i_n * C + o_c < T)[:, None] & m_k
    o_in = (o_t * HK + i_hk)[:, None] * K + o_k[None, :]
    b_own = tl.load(p_own + o_in, mask=m_in, other=0.0).to(tl.float32)
    b_d = tl.zeros([C, BK], tl.float32)
    for i in range(heads):
        i_c = i_first + tl.cast(i, tl.int64) * N
        o_out = i_c * C * K + o_c[:, None] * K + o_k[None, :]
        b_log = tl.zeros([C], tl.float32)
        if p_d_decayed is not None:
            b_g = tl.load(p_d_decayed + o_out, mask=m_k, other=0.0).to(tl.float32)
            if QUERY:
                b_g *= scale * read_decay(p_cum, p_segment, p_decay, i_c, C)[:, None]
            else:
                b_g *= end_decay(p_left, i_c, C)[:, None]
            b_d += b_g
            b_log += tl.sum(b_g * b_own, 1)
        tl.store(p_d_log + i_k * ENTRIES + i_c * C + o_c, b_log)
        if p_d_closed is not None:
            b_d += scale * tl.load(p_d_closed + o_out, mask=m_k, other=0.0).to(tl.float32)
    if p_d_scores is not None:
        o_s = o_c[:, None] * C + o_c[None, :] if QUERY else o_c[None, :] * C + o_c[:, None]
        b_s = tl.load(p_d_scores + i_p * C * C + o_s)
        b_d += tl.dot(b_s, tl.load(p_other + o_in, mask=m_in, other=0.0), input_precision=PRECISION)
    o_d = ((o_t * HK + i_hk) * BLOCKS + i_block)[:, None] * K + o_k[None, :]
    tl.store(p_d_own + o_d, b_d.to(p_d_own.dtype.element_ty), mask=m_in)


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
        q, k, document_start, decays.cum, decays.left, decays.segment, decays.decay, mixing, closed, query, key_end,
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
) -> tuple[Tensor, Tensor, DecayAdjoints]:
    """dq, dk as q [B,T,Hk,K], and the adjoints of the decays."""
    batch, heads, chunks, chunk = decays.cum.shape
    key_heads = k.shape[2]
    settings = _settings("mamba2_input_backward", q, chunk, heads)
    blocks = cdiv(heads // key_heads, settings["HEADS"])
    programs = batch * chunks * key_heads * blocks
    d_scores = d_cum = d_end = None
    if d_mixing is not None:
        d_cum, d_end = (torch.empty_like(decays.cum) for _ in range(2))
        d_scores = q.new_empty(programs, chunk, chunk)
        scores_settings = _settings("mamba2_scores_backward", q, chunk, heads) | {"HEADS": settings["HEADS"]}
        launch(
            mamba2_scores_backward_kernel, (programs,),
            q, k, document_start, decays.cum, decays.left, decays.segment, d_mixing, d_scores, d_cum, d_end, scale,
            k.shape[1], heads, key_heads, chunks, blocks,
            K=k.shape[3], C=chunk, PRECISION=dot_precision(q.dtype), **scores_settings,
        )  # fmt: skip

    def gradient(
        own: Tensor, other: Tensor, d_closed: Tensor | None, d_decayed: Tensor | None, *, query: bool
    ) -> tuple[Tensor, Tensor]:
        _, tokens, _, key_dim = own.shape
        tiles = cdiv(key_dim, settings["BK"])
        d_own = own.new_empty(
            batch, tokens, key_heads, blocks, key_dim, dtype=own.dtype if blocks == 1 else torch.float32
        )
        d_log = decays.cum.new_empty(tiles, *decays.cum.shape)
        launch(
            mamba2_input_backward_kernel, (programs * tiles,),
            own, other, decays.cum, decays.left, decays.segment, decays.decay, d_scores, d_closed, d_decayed, d_log,
            d_own, scale, tokens, heads, key_heads, chunks, blocks, decays.cum.numel(),
            K=key_dim, C=chunk, QUERY=query, PRECISION=dot_precision(own.dtype), **settings,
        )  # fmt: skip
        return d_own[:, :, :, 0] if blocks == 1 else d_own.sum(3).to(own.dtype), d_log

    dq, d_read = gradient(q, k, d_query_closed, d_query_open, query=True)
    dk, d_key = gradient(k, q, None, d_key_end, query=False)
    return dq, dk, DecayAdjoints(d_cum, d_end, d_read, d_key)


def _settings(kernel: str, q: Tensor, chunk: int, heads: int) -> dict[str, int]:
    settings = settings_of(kernel, q.device, chunk, q.shape[3])
    return settings | {"HEADS": min(settings.get("HEADS", heads), heads // q.shape[2])}
