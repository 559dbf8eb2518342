# mypy: disable-error-code="no-untyped-def"
"""Gradients of the drift score in its own key and value, the open state held constant (docs/dla.md section 2.6).

The score of token t is a function of m = k^T S v, r = |S^T k|^2, |k|^2 and |v|^2, so with the four partial derivatives
a_m, a_r, a_k and a_v

    dI/dv = a_m S^T k + 2 a_v v        dI/dk = S x + 2 a_k k        x = a_m v + 2 a_r S^T k

S is, as in the tables, a sum over the tokens of the open segment: those of the chunk itself and, for tokens before its
first boundary, those of the chunk before it or the state it was entered with. S^T k and S x pass through the outputs.
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
def _read_state(
    p_k, p_key_open, p_states, b_factor, i_bh, i_b, i_h, i_n, i_o, o_v, T, H, HK,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S^T k [C, BV] of the state the chunk was entered with, at columns o_v."""
    o_c = tl.arange(0, C)
    b_read = tl.zeros([C, BV], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_key = key_tile(
            p_k, p_key_open, b_factor[:, None], i_bh, i_b, i_h, i_n, i_o, o_k[None, :], o_c[:, None], T, H, HK, K, C
        )
        b_s = state_tile(p_states, i_o, o_k[:, None], o_v[None, :], K, V)
        b_read = tl.dot(b_key, b_s, b_read, input_precision=PRECISION)
    return b_read


@triton.jit
def _state_product(
    p_v, p_grad_v, p_states, b_m, b_r, m_t, i_b, i_h, i_n, i_o, o_k, T, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S x [C, BK] of the state the chunk was entered with, at rows o_k; S^T k lies in p_grad_v."""
    o_c = tl.arange(0, C)
    b_sx = tl.zeros([C, BK], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_v = value_tile(p_v, i_b, i_h, i_n, o_v[None, :], o_c[:, None], T, H, V, C)
        p_tile = p_grad_v + (o_c[:, None] * (H * V) + o_v[None, :])
        b_read = tl.load(p_tile, mask=m_t[:, None] & (o_v < V)[None, :], other=0.0)
        b_x = b_m[:, None] * b_v + 2 * b_r[:, None] * b_read
        b_s = state_tile(p_states, i_o, o_k[None, :], o_v[:, None], K, V)
        b_sx = tl.dot(b_x, b_s, b_sx, input_precision=PRECISION)
    return b_sx


@triton.jit(do_not_specialize=["T", "H", "HK", "first_chunk", "chunks", "ring", "chunks_in_row"])
def drift_gradients_kernel(
    p_k, p_v, p_log_decay, p_beta, p_start, p_matrix, p_terms, p_recall, p_key_open, p_key_end, p_newest, p_states,
    p_entry_norm, p_boundary, p_grad_k, p_grad_v, T, H, HK, first_chunk, chunks, ring, chunks_in_row,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UPDATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k [B,T,H,K] and grad_v [B,T,H,V] float32 of one chunk; 0 at a document's first token."""
    GATED: tl.constexpr = p_beta is not None
    i_b, i_h, i_n, i_o = program_chunk(H, chunks, first_chunk, ring)
    i_bh = i_b * H + i_h
    i_e = i_bh * ring + (i_n - 1) % ring
    o_c = tl.arange(0, C)
    o_t, m_t, b_start = tokens_of(p_start, i_b, i_n, T, C)
    o_l = o_t - C
    m_l = o_l >= 0
    b_g, b_erase, b_write = gates_of(p_log_decay, p_beta, i_b, i_h, o_t, m_t, T, H)
    b_cum = tl.load(p_terms + (i_o * TERMS + CUM) * C + o_c)
    b_kk = tl.load(p_terms + (i_o * TERMS + KEY_NORM) * C + o_c)
    b_vv = tl.load(p_terms + (i_o * TERMS + VALUE_NORM) * C + o_c)
    p_key = p_k + ((i_b * T + i_n * C) * HK + i_h // (H // HK)) * K
    p_value = p_v + ((i_b * T + i_n * C) * H + i_h) * V

    p_grad_k += ((i_b * T + i_n * C) * H + i_h) * K
    p_grad_v += ((i_b * T + i_n * C) * H + i_h) * V

    b_opens = tl.load(p_boundary + i_bh * T + o_t, mask=m_t, other=0).to(tl.int32)
    b_segment = tl.sum(tl.where(o_c[:, None] >= o_c[None, :], b_opens[None, :], 0), 1)
    b_opened = b_segment - b_opens
    m_entered = b_opened == 0
    m_sees = sees_earlier(o_t, m_t, b_start)
    m_open = m_sees & (b_segment[None, :] == b_opened[:, None])
    b_decay = tl.where(m_open, decay_between(b_cum - b_g, b_cum, m_sees), 0.0)
    i_newest = tl.load(p_newest + i_bh * (BEFORE_ROW + chunks_in_row) + BEFORE_ROW + i_n - 1)
    # [t, l]: token t is scored against a segment that holds token l of the chunk before
    m_across = (m_entered & m_t)[:, None] & (o_c >= i_newest)[None, :]

    if GATED:
        b_recall = tl.load(p_recall + i_o * C * C + (o_c[:, None] * C + o_c[None, :]))
        b_recall = tl.where(m_open, b_recall, 0.0)
    else:
        b_recall = row_products(p_key, p_key, m_t, m_t, HK * K, K, BK, C, PRECISION) * b_decay
    b_past = tl.zeros([C, C], tl.float32)
    b_to_end = tl.zeros([C], tl.float32)
    if i_newest >= 0:
        b_state_norm = tl.load(p_terms + (i_e * TERMS + END_NORM) * C + i_newest)
        if GATED:
            b_past = row_products(p_key_open + i_o * C * K, p_key_end + i_e * C * K, m_l, m_l, K, K, BK, C, PRECISION)
        else:
            b_past_cum = tl.load(p_terms + (i_e * TERMS + CUM) * C + o_c)
            _, b_to_end = chunk_end(p_start, b_past_cum, o_l, i_b, i_n - 1, T, C)
            b_past = row_products(p_key, p_key - C * HK * K, m_t, m_l, HK * K, K, BK, C, PRECISION)
            b_past *= tl.exp(b_cum - b_g)[:, None] * b_to_end[None, :]
        b_past = tl.where(m_across, b_past, 0.0)
    else:
        b_state_norm = tl.load(p_entry_norm + i_o)

    b_matched = tl.zeros([C], tl.float32)
    b_recalled = tl.zeros([C], tl.float32)
    b_inner = tl.zeros([C, C], tl.float32)
    b_inner_past = tl.zeros([C, C], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_v = value_tile(p_v, i_b, i_h, i_n, o_v[None, :], o_c[:, None], T, H, V, C)
        b_read = tl.dot(b_recall, b_v, input_precision=PRECISION)
        if i_newest >= 0:
            b_w = value_tile(p_v, i_b, i_h, i_n - 1, o_v[None, :], o_c[:, None], T, H, V, C)
            b_read = tl.dot(b_past, b_w, b_read, input_precision=PRECISION)
        else:
            b_entry = _read_state(
                p_k, p_key_open, p_states, tl.exp(b_cum - b_g), i_bh, i_b, i_h, i_n, i_o, o_v, T, H, HK,
                K, V, C, BK, BV, PRECISION,
            )  # fmt: skip
            b_read += tl.where(m_entered[:, None], b_entry, 0.0)
        b_matched += tl.sum(b_read * b_v, 1)
        b_recalled += tl.sum(b_read * b_read, 1)
        p_tile = p_grad_v + (o_c[:, None] * (H * V) + o_v[None, :])
        tl.store(p_tile, b_read, mask=m_t[:, None] & (o_v < V)[None, :])
        if UPDATE:
            b_vt = value_tile(p_v, i_b, i_h, i_n, o_v[:, None], o_c[None, :], T, H, V, C)
            b_inner = tl.dot(b_read, b_vt, b_inner, input_precision=PRECISION)
            if i_newest >= 0:
                b_wt = value_tile(p_v, i_b, i_h, i_n - 1, o_v[:, None], o_c[None, :], T, H, V, C)
                b_inner_past = tl.dot(b_read, b_wt, b_inner_past, input_precision=PRECISION)
    m_opens = b_opens > 0
    b_gain = norm_gain(
        tl.where(m_opens, 0.0, b_matched), tl.where(m_opens, 0.0, b_recalled), b_g, b_erase, b_write, b_kk, b_vv, GATED
    )
    b_norm = tl.sum(b_decay * b_decay * b_gain[None, :], 1)
    b_norm += tl.where(m_entered, tl.exp(2 * (b_cum - b_g)) * b_state_norm, 0.0)
    b_am, b_ar, b_ak, b_av = _partial_derivatives(
        b_matched, b_recalled, b_norm, b_g, b_erase, b_write, b_kk, b_vv, UPDATE, GATED
    )
    m_scored = m_t & (o_t != b_start)
    b_am = tl.where(m_scored, b_am, 0.0)
    b_ar = tl.where(m_scored, b_ar, 0.0)

    # x_t . v_l, of the chunk's own tokens and of those before
    b_inner = b_am[:, None] * row_products(p_value, p_value, m_t, m_t, H * V, V, BV, C, PRECISION) + (
        2 * b_ar[:, None] * b_inner
    )
    if i_newest >= 0:
        b_across = row_products(p_value, p_value - C * H * V, m_t, m_l, H * V, V, BV, C, PRECISION)
        b_inner_past = tl.where(m_across, b_am[:, None] * b_across + 2 * b_ar[:, None] * b_inner_past, 0.0)
    tl.debug_barrier()
    b_erased = tl.zeros([C, C], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        if i_newest >= 0:
            b_key = key_tile(
                p_k, p_key_end, b_to_end[:, None], i_bh, i_b, i_h, i_n - 1, i_e, o_k[None, :], o_c[:, None],
                T, H, HK, K, C,
            )  # fmt: skip
            b_sx = tl.dot(b_inner_past, b_key, input_precision=PRECISION)
        else:
            b_sx = _state_product(
                p_v, p_grad_v, p_states, b_am, b_ar, m_t, i_b, i_h, i_n, i_o, o_k, T, H, K, V, C, BK, BV, PRECISION
            )
            b_sx = tl.where(m_entered[:, None], b_sx, 0.0)
        p_tile = p_grad_k + (o_c[:, None] * (H * K) + o_k[None, :])
        tl.store(p_tile, b_sx, mask=m_t[:, None] & (o_k < K)[None, :])
        if GATED:
            b_kt = key_tile(p_k, None, 1.0, i_bh, i_b, i_h, i_n, i_o, o_k[:, None], o_c[None, :], T, H, HK, K, C)
            b_erased = tl.dot(b_sx, b_kt, b_erased, input_precision=PRECISION)
    if GATED:
        b_inner -= tl.where((b_segment == 0)[None, :], tl.exp(b_cum)[None, :] * b_erased, 0.0)
        i_m = i_bh * chunks + i_n - first_chunk
        b_matrix_t = tl.load(p_matrix + i_m * C * C + (o_c[None, :] * C + o_c[:, None]))
        b_matrix_t = tl.where(b_segment[None, :] == b_segment[:, None], b_matrix_t, 0.0)
        b_inner = tl.dot(b_inner, b_matrix_t, input_precision=PRECISION)
    b_inner *= b_decay
    tl.debug_barrier()
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        p_tile = p_grad_k + (o_c[:, None] * (H * K) + o_k[None, :])
        m_tile = m_t[:, None] & (o_k < K)[None, :]
        b_key = key_tile(p_k, None, 1.0, i_bh, i_b, i_h, i_n, i_o, o_k[None, :], o_c[:, None], T, H, HK, K, C)
        b_sx = tl.exp(b_cum - b_g)[:, None] * tl.load(p_tile, mask=m_tile, other=0.0)
        b_sx = tl.dot(b_inner, b_key, b_sx, input_precision=PRECISION)
        tl.store(p_tile, b_sx + tl.where(m_scored, 2 * b_ak, 0.0)[:, None] * b_key, mask=m_tile)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        p_tile = p_grad_v + (o_c[:, None] * (H * V) + o_v[None, :])
        m_tile = m_t[:, None] & (o_v < V)[None, :]
        b_v = value_tile(p_v, i_b, i_h, i_n, o_v[None, :], o_c[:, None], T, H, V, C)
        b_read = b_am[:, None] * tl.load(p_tile, mask=m_tile, other=0.0)
        tl.store(p_tile, b_read + tl.where(m_scored, 2 * b_av, 0.0)[:, None] * b_v, mask=m_tile)
