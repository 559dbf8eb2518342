# mypy: disable-error-code="no-untyped-def"
"""Gradients of the drift score in its own key and value, the open state held constant (docs/dla.md section 2.6).

The score of token t is a function of m = k^T S v, r = |S^T k|^2, |k|^2 and |v|^2, so with the four partial derivatives
a_m, a_r, a_k and a_v

    dI/dv = a_m S^T k + 2 a_v v        dI/dk = S x + 2 a_k k        x = a_m v + 2 a_r S^T k

S is, as in the tables, a sum over the tokens of the open segment: those of the chunk itself and, for tokens before its
first boundary, those of the chunk before it or the state it was entered with. `drift_reads` makes S^T k and the partial
derivatives, `drift_gradients` S x and the results; S^T k and part of S x wait in the outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dla_kernels.memory.drift_tables_triton import (
    CUM,
    END_NORM,
    KEY_NORM,
    TERMS,
    VALUE_NORM,
    chunk_end,
    decay_between,
    drift_score,
    gates_of,
    norm_gain,
    program_chunk,
    row_products,
    sees_earlier,
    tokens_of,
)
from dla_kernels.memory.drift_walk_triton import BEFORE_ROW, key_tile, state_tile, value_tile


@triton.jit
def _partial_derivatives(
    b_matched, b_recalled, b_norm, b_g, b_erase, b_write, b_kk, b_vv, UPDATE: tl.constexpr, GATED: tl.constexpr
):
    """(a_m, a_r, a_k, a_v) [C]; 0 where the score is 0 or a side is zero."""
    b_score = drift_score(b_matched, b_recalled, b_norm, b_g, b_erase, b_write, b_kk, b_vv, UPDATE, GATED)
    b_decay = tl.exp(b_g)
    if UPDATE:
        b_gain = norm_gain(b_matched, b_recalled, b_g, b_erase, b_write, b_kk, b_vv, GATED)
        b_inner = b_decay * (b_norm - b_erase * b_recalled) + b_write * b_matched
        b_size = (b_decay * b_decay * b_norm + b_gain) * b_norm
    else:
        b_inner = b_matched
        b_size = b_kk * b_vv * b_norm
    m_moves = (b_size > 0) & (b_score > 0)
    b_safe = tl.where(m_moves, b_size, 1.0)
    b_root = tl.where(m_moves, -tl.rsqrt(b_safe) / tl.where(m_moves, b_score, 1.0), 0.0)
    b_half = -0.5 * b_inner * b_root / b_safe
    if UPDATE:
        b_half *= b_norm
        b_erases = b_decay * b_erase
        b_m = b_root * b_write + b_half * 2 * b_decay * b_write * (1 - b_erase * b_kk)
        b_r = -b_root * b_erases - b_half * b_decay * b_erases * (2 - b_erase * b_kk)
        b_k = b_half * (
            b_write * b_write * b_vv - 2 * b_erases * b_write * b_matched + b_erases * b_erases * b_recalled
        )
        b_v = b_half * b_write * b_write * b_kk
        return b_m, b_r, b_k, b_v
    else:
        return b_root, tl.zeros_like(b_root), b_half * b_vv * b_norm, b_half * b_kk * b_norm


@triton.jit
def _segments(p_boundary, p_newest, i_b, i_h, i_n, T, H, chunks_in_row, C: tl.constexpr):
    """(boundaries of the chunk up to each token [C], likewise before it, where the segment that the chunk was entered
    with began in the chunk before, -1: earlier). A token is scored against the segment of the second number."""
    o_c = tl.arange(0, C)
    o_t = i_n * C + o_c
    b_opens = tl.load(p_boundary + (i_b * H + i_h) * T + o_t, mask=o_t < T, other=0).to(tl.int32)
    b_segment = tl.sum(tl.where(o_c[:, None] >= o_c[None, :], b_opens[None, :], 0), 1)
    i_newest = tl.load(p_newest + (i_b * H + i_h) * (BEFORE_ROW + chunks_in_row) + BEFORE_ROW + i_n - 1)
    return b_segment, b_segment - b_opens, i_newest


@triton.jit
def _holds(b_segment, b_scored, o_t, m_t, b_start):
    """[C, C] bool: token t is scored against a segment that holds token l of the chunk."""
    return sees_earlier(o_t, m_t, b_start) & (b_segment[None, :] == b_scored[:, None])


@triton.jit
def _held_before(b_scored, i_newest, m_t, C: tl.constexpr):
    """[C, C] bool: likewise of the chunk before."""
    return ((b_scored == 0) & m_t)[:, None] & (tl.arange(0, C) >= i_newest)[None, :]


@triton.jit(do_not_specialize=["T", "H", "HK", "first_chunk", "chunks", "ring", "chunks_in_row"])
def drift_reads_kernel(
    p_k, p_v, p_log_decay, p_beta, p_start, p_terms, p_recall, p_key_open, p_key_end, p_newest, p_states,
    p_entry_norm, p_boundary, p_partials, p_read, T, H, HK, first_chunk, chunks, ring, chunks_in_row,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UPDATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """read [B,T,H,V] = S^T k and partials [B,H,R,4,C] of one chunk; the partials are 0 at a document's first token."""
    GATED: tl.constexpr = p_beta is not None
    i_b, i_h, i_n, i_o = program_chunk(H, chunks, first_chunk, ring)
    i_bh = i_b * H + i_h
    i_e = i_bh * ring + (i_n - 1) % ring
    o_c = tl.arange(0, C)
    o_t, m_t, b_start = tokens_of(p_start, i_b, i_n, T, C)
    b_g, b_erase, b_write = gates_of(p_log_decay, p_beta, i_b, i_h, o_t, m_t, T, H)
    b_cum = tl.load(p_terms + (i_o * TERMS + CUM) * C + o_c)
    b_segment, b_scored, i_newest = _segments(p_boundary, p_newest, i_b, i_h, i_n, T, H, chunks_in_row, C)
    m_entered = b_scored == 0
    m_open = _holds(b_segment, b_scored, o_t, m_t, b_start)
    b_decay = decay_between(b_cum - b_g, b_cum, m_open)
    p_key = p_k + ((i_b * T + i_n * C) * HK + i_h // (H // HK)) * K
    if GATED:
        b_recall = tl.load(p_recall + i_o * C * C + (o_c[:, None] * C + o_c[None, :]))
        b_recall = tl.where(m_open, b_recall, 0.0)
    else:
        b_recall = row_products(p_key, p_key, m_t, m_t, HK * K, K, BK, C, PRECISION) * b_decay
    b_past = tl.zeros([C, C], tl.float32)
    if i_newest >= 0:
        m_l = o_t >= C
        b_state_norm = tl.load(p_terms + (i_e * TERMS + END_NORM) * C + i_newest)
        if GATED:
            b_past = row_products(p_key_open + i_o * C * K, p_key_end + i_e * C * K, m_l, m_l, K, K, BK, C, PRECISION)
        else:
            b_past_cum = tl.load(p_terms + (i_e * TERMS + CUM) * C + o_c)
            _, b_to_end = chunk_end(p_start, b_past_cum, o_t - C, i_b, i_n - 1, T, C)
            b_past = row_products(p_key, p_key - C * HK * K, m_t, m_l, HK * K, K, BK, C, PRECISION)
            b_past *= tl.exp(b_cum - b_g)[:, None] * b_to_end[None, :]
        b_past = tl.where(_held_before(b_scored, i_newest, m_t, C), b_past, 0.0)
    else:
        b_state_norm = tl.load(p_entry_norm + i_o)

    p_read += ((i_b * T + i_n * C) * H + i_h) * V
    b_matched = tl.zeros([C], tl.float32)
    b_recalled = tl.zeros([C], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_v = value_tile(p_v, i_b, i_h, i_n, o_v[None, :], o_c[:, None], T, H, V, C)
        b_read = tl.dot(b_recall, b_v, input_precision=PRECISION)
        if i_newest >= 0:
            b_w = value_tile(p_v, i_b, i_h, i_n - 1, o_v[None, :], o_c[:, None], T, H, V, C)
            b_read = tl.dot(b_past, b_w, b_read, input_precision=PRECISION)
        else:
            b_entry = tl.zeros([C, BV], tl.float32)
            for i_k in range(0, K, BK):
                o_k = i_k + tl.arange(0, BK)
                b_key = key_tile(
                    p_k, p_key_open, tl.exp(b_cum - b_g)[:, None], i_b, i_h, i_n, i_o, o_k[None, :], o_c[:, None],
                    T, H, HK, K, C,
                )  # fmt: skip
                b_s = state_tile(p_states, i_o, o_k[:, None], o_v[None, :], K, V)
                b_entry = tl.dot(b_key, b_s, b_entry, input_precision=PRECISION)
            b_read += tl.where(m_entered[:, None], b_entry, 0.0)
        b_matched += tl.sum(b_read * b_v, 1)
        b_recalled += tl.sum(b_read * b_read, 1)
        o_tile = (o_c * (H * V))[:, None] + o_v[None, :]
        tl.store(p_read + o_tile, b_read, mask=m_t[:, None] & (o_v < V)[None, :])
    b_kk = tl.load(p_terms + (i_o * TERMS + KEY_NORM) * C + o_c)
    b_vv = tl.load(p_terms + (i_o * TERMS + VALUE_NORM) * C + o_c)
    # A boundary's own match is with the segment before it.
    m_on = b_segment == b_scored
    b_gain = norm_gain(
        tl.where(m_on, b_matched, 0.0), tl.where(m_on, b_recalled, 0.0), b_g, b_erase, b_write, b_kk, b_vv, GATED
    )
    b_norm = tl.sum(b_decay * b_decay * b_gain[None, :], 1)
    b_norm += tl.where(m_entered, tl.exp(2 * (b_cum - b_g)) * b_state_norm, 0.0)
    b_am, b_ar, b_ak, b_av = _partial_derivatives(
        b_matched, b_recalled, b_norm, b_g, b_erase, b_write, b_kk, b_vv, UPDATE, GATED
    )
    m_scored = m_t & (o_t != b_start)
    p_partials += i_o * 4 * C + o_c
    tl.store(p_partials, tl.where(m_scored, b_am, 0.0))
    tl.store(p_partials + C, tl.where(m_scored, b_ar, 0.0))
    tl.store(p_partials + 2 * C, tl.where(m_scored, b_ak, 0.0))
    tl.store(p_partials + 3 * C, tl.where(m_scored, b_av, 0.0))


@triton.jit
def _x_tile(p_v, p_read, b_m, b_r, i_b, i_h, i_n, o_v, o_c, T, H, V: tl.constexpr, C: tl.constexpr):
    """x = a_m v + 2 a_r S^T k [C, BV]."""
    b_v = value_tile(p_v, i_b, i_h, i_n, o_v[None, :], o_c[:, None], T, H, V, C)
    m_tile = (o_c < T - i_n * C)[:, None] & (o_v < V)[None, :]
    b_read = tl.load(p_read + ((o_c * (H * V))[:, None] + o_v[None, :]), mask=m_tile, other=0.0)
    return b_m[:, None] * b_v + 2 * b_r[:, None] * b_read


@triton.jit
def _x_products(
    p_v, p_read, b_m, b_r, i_b, i_h, i_n, i_w, T, H,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, UPDATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x v^T [C, C] with the values of chunk i_w."""
    o_c = tl.arange(0, C)
    if UPDATE:
        b_xv = tl.zeros([C, C], tl.float32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_x = _x_tile(p_v, p_read, b_m, b_r, i_b, i_h, i_n, o_v, o_c, T, H, V, C)
            b_vt = value_tile(p_v, i_b, i_h, i_w, o_v[:, None], o_c[None, :], T, H, V, C)
            b_xv = tl.dot(b_x, b_vt, b_xv, input_precision=PRECISION)
        return b_xv
    else:
        p_value = p_v + (i_b * T * H + i_h) * V
        m_t, m_w = o_c < T - i_n * C, o_c < T - i_w * C
        p_x, p_w = p_value + i_n * C * H * V, p_value + i_w * C * H * V
        # 16-bit operands leave room for a wider tile than those of float32.
        b_vv = row_products(p_x, p_w, m_t, m_w, H * V, V, 4 * BV, C, PRECISION)
        return b_m[:, None] * b_vv


@triton.jit(do_not_specialize=["T", "H", "HK", "first_chunk", "chunks", "ring", "chunks_in_row"])
def drift_gradients_kernel(
    p_k, p_v, p_log_decay, p_beta, p_start, p_matrix, p_terms, p_key_end, p_newest, p_states,
    p_boundary, p_partials, p_grad_k, p_grad_v, T, H, HK, first_chunk, chunks, ring, chunks_in_row,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UPDATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k [B,T,H,K] and grad_v [B,T,H,V] float32 of one chunk; grad_v comes as S^T k."""
    GATED: tl.constexpr = p_beta is not None
    i_b, i_h, i_n, i_o = program_chunk(H, chunks, first_chunk, ring)
    i_e = (i_b * H + i_h) * ring + (i_n - 1) % ring
    o_c = tl.arange(0, C)
    o_t, m_t, b_start = tokens_of(p_start, i_b, i_n, T, C)
    b_segment, b_scored, i_newest = _segments(p_boundary, p_newest, i_b, i_h, i_n, T, H, chunks_in_row, C)
    p_partials += i_o * 4 * C + o_c
    b_m, b_r = tl.load(p_partials), tl.load(p_partials + C)
    p_grad_k += ((i_b * T + i_n * C) * H + i_h) * K
    p_grad_v += ((i_b * T + i_n * C) * H + i_h) * V

    b_past = tl.zeros([C, C], tl.float32)
    b_to_end = tl.zeros([C], tl.float32)
    if i_newest >= 0:
        b_past = _x_products(p_v, p_grad_v, b_m, b_r, i_b, i_h, i_n, i_n - 1, T, H, V, C, BV, UPDATE, PRECISION)
        b_past = tl.where(_held_before(b_scored, i_newest, m_t, C), b_past, 0.0)
        b_past_cum = tl.load(p_terms + (i_e * TERMS + CUM) * C + o_c)
        _, b_to_end = chunk_end(p_start, b_past_cum, o_t - C, i_b, i_n - 1, T, C)
    b_erased = tl.zeros([C, C], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_sx = tl.zeros([C, BK], tl.float32)
        if i_newest >= 0:
            b_key = key_tile(
                p_k, p_key_end, b_to_end[:, None], i_b, i_h, i_n - 1, i_e, o_k[None, :], o_c[:, None], T, H, HK, K, C
            )
            b_sx = tl.dot(b_past, b_key, b_sx, input_precision=PRECISION)
        else:
            for i_v in range(0, V, BV):
                o_v = i_v + tl.arange(0, BV)
                b_x = _x_tile(p_v, p_grad_v, b_m, b_r, i_b, i_h, i_n, o_v, o_c, T, H, V, C)
                b_s = state_tile(p_states, i_o, o_k[None, :], o_v[:, None], K, V)
                b_sx = tl.dot(b_x, b_s, b_sx, input_precision=PRECISION)
            b_sx = tl.where((b_scored == 0)[:, None], b_sx, 0.0)
        o_tile = (o_c * (H * K))[:, None] + o_k[None, :]
        tl.store(p_grad_k + o_tile, b_sx, mask=m_t[:, None] & (o_k < K)[None, :])
        if GATED:
            b_kt = key_tile(p_k, None, 1.0, i_b, i_h, i_n, i_o, o_k[:, None], o_c[None, :], T, H, HK, K, C)
            b_erased = tl.dot(b_sx, b_kt, b_erased, input_precision=PRECISION)
    tl.debug_barrier()
    # Loaded anew: what is held over the loop above is not free.
    o_t, m_t, b_start = tokens_of(p_start, i_b, i_n, T, C)
    b_g, b_erase, b_write = gates_of(p_log_decay, None, i_b, i_h, o_t, m_t, T, H)
    b_cum = tl.load(p_terms + (i_o * TERMS + CUM) * C + o_c)
    b_segment, b_scored, i_newest = _segments(p_boundary, p_newest, i_b, i_h, i_n, T, H, chunks_in_row, C)
    b_m, b_r = tl.load(p_partials), tl.load(p_partials + C)
    b_inner = _x_products(p_v, p_grad_v, b_m, b_r, i_b, i_h, i_n, i_n, T, H, V, C, BV, UPDATE, PRECISION)
    if GATED:
        b_inner -= tl.exp(b_cum)[None, :] * b_erased
        i_m = (i_b * H + i_h) * chunks + i_n - first_chunk
        b_matrix_t = tl.load(p_matrix + i_m * C * C + (o_c[None, :] * C + o_c[:, None]))
        b_matrix_t = tl.where(b_segment[None, :] == b_segment[:, None], b_matrix_t, 0.0)
        b_inner = tl.dot(b_inner, b_matrix_t, input_precision=PRECISION)
    b_inner *= decay_between(b_cum - b_g, b_cum, _holds(b_segment, b_scored, o_t, m_t, b_start))
    b_ak, b_av = tl.load(p_partials + 2 * C), tl.load(p_partials + 3 * C)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        o_tile = (o_c * (H * K))[:, None] + o_k[None, :]
        m_tile = m_t[:, None] & (o_k < K)[None, :]
        b_key = key_tile(p_k, None, 1.0, i_b, i_h, i_n, i_o, o_k[None, :], o_c[:, None], T, H, HK, K, C)
        b_sx = tl.exp(b_cum - b_g)[:, None] * tl.load(p_grad_k + o_tile, mask=m_tile, other=0.0)
        b_sx = tl.dot(b_inner, b_key, b_sx, input_precision=PRECISION)
        tl.store(p_grad_k + o_tile, b_sx + 2 * b_ak[:, None] * b_key, mask=m_tile)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        o_tile = (o_c * (H * V))[:, None] + o_v[None, :]
        m_tile = m_t[:, None] & (o_v < V)[None, :]
        b_v = value_tile(p_v, i_b, i_h, i_n, o_v[None, :], o_c[:, None], T, H, V, C)
        b_read = b_m[:, None] * tl.load(p_grad_v + o_tile, mask=m_tile, other=0.0)
        tl.store(p_grad_v + o_tile, b_read + 2 * b_av[:, None] * b_v, mask=m_tile)
