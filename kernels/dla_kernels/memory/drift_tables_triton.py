# mypy: disable-error-code="no-untyped-def"
"""Drift tables of one chunk, and of one chunk against the chunk before it (docs/dla.md section 6).

`drift_tables` scores every token of a chunk against a segment opened at every earlier token of it; `drift_links` scores
it against a segment opened at every token of the chunk before. With the keys as they stand at that chunk's end the
second is the same sum over pairs of tokens, so a segment that ends in the chunk after its own is scored without its
state. Both keep, for every opening, the first boundary and the last one reached, so that what is left to do one chunk
after the other is to look integers up. Tables are [t, a], t the scored token, and float32; the products of 16-bit
inputs that they start from are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of the workspace `terms` [B, H, R, TERMS, C] float32.
CUM: tl.constexpr = tl.constexpr(0)  # G, since the chunk's or the token's document's start
KEY_NORM: tl.constexpr = tl.constexpr(1)  # |k|^2
VALUE_NORM: tl.constexpr = tl.constexpr(2)  # |v|^2
MATCHED: tl.constexpr = tl.constexpr(3)  # k^T S v of the chunk's own earlier tokens
RECALLED: tl.constexpr = tl.constexpr(4)  # |S^T k|^2 of the same
END_NORM: tl.constexpr = tl.constexpr(5)  # |S|^2 at the chunk's end of a segment opened at the token
ENTRY_SCORE: tl.constexpr = tl.constexpr(6)  # score against the state the chunk was entered with, where that was needed
TERMS: tl.constexpr = tl.constexpr(7)

# Rows of the workspace `steps` [B, H, R, STEPS, C] int32.
JUMP: tl.constexpr = tl.constexpr(0)  # next boundary of the chunk after an opening at the token (C: none)
LAST: tl.constexpr = tl.constexpr(1)  # last boundary of the chunk that a walk from the token reaches
FIRST: tl.constexpr = tl.constexpr(2)  # first boundary after an opening at this token of the chunk before (C: none)
AFTER: tl.constexpr = tl.constexpr(3)  # the chunk's last boundary then (-1: none)
STEPS: tl.constexpr = tl.constexpr(4)


@triton.jit
def program_chunk(H, chunks, first_chunk, ring):
    """(sequence, head, chunk, its place in the workspace) of a grid with heads running fastest: they share keys."""
    i_p = tl.program_id(0)
    i_h = (i_p % H).to(tl.int64)
    i_n = (first_chunk + i_p // H % chunks).to(tl.int64)
    i_b = (i_p // H // chunks).to(tl.int64)
    return i_b, i_h, i_n, (i_b * H + i_h) * ring + i_n % ring


@triton.jit
def tokens_of(p_start, i_b, i_n, T, C: tl.constexpr):
    """(token [C], whether it exists, first token of its document) of chunk i_n; padding continues the last document."""
    o_t = i_n * C + tl.arange(0, C)
    return o_t, o_t < T, tl.load(p_start + i_b * T + tl.minimum(o_t, T - 1))


@triton.jit
def sees_earlier(o_t, m_t, b_start):
    """[C, C] bool: token t sees the earlier token l of its document."""
    return (o_t[:, None] > o_t[None, :]) & (o_t[None, :] >= b_start[:, None]) & m_t[:, None]


@triton.jit
def gates_of(p_log_decay, p_beta, i_b, i_h, o_t, m_t, T, H):
    """(g, erase, write) [C] float32; erase is 0 and write 1 where there is no beta."""
    o_g = (i_b * T + o_t) * H + i_h
    b_g = tl.load(p_log_decay + o_g, mask=m_t, other=0.0).to(tl.float32)
    if p_beta is None:
        return b_g, tl.zeros_like(b_g), tl.full(b_g.shape, 1.0, tl.float32)
    else:
        b_beta = tl.load(p_beta + o_g, mask=m_t, other=0.0).to(tl.float32)
        return b_g, b_beta, b_beta


@triton.jit
def decay_between(b_reader, b_writer, m_sees):
    """exp(reader_t - writer_l) [C, C] where t sees l, 0 elsewhere."""
    b_log = b_reader[:, None] - b_writer[None, :]
    return tl.where(m_sees, tl.exp(tl.where(m_sees, b_log, 0.0)), 0.0)


@triton.jit
def norm_gain(b_matched, b_recalled, b_g, b_erase, b_write, b_kk, b_vv, GATED: tl.constexpr):
    """|S'|^2 - e^(2g) |S|^2, S' being S after the token; b_kk = |k|^2, b_vv = |v|^2."""
    b_decay = tl.exp(b_g)
    b_gain = b_write * b_write * b_kk * b_vv + 2 * b_decay * b_write * (1 - b_erase * b_kk) * b_matched
    if GATED:
        b_gain -= b_decay * b_decay * (2 * b_erase - b_erase * b_erase * b_kk) * b_recalled
    return b_gain


@triton.jit
def drift_score(
    b_matched, b_recalled, b_norm, b_g, b_erase, b_write, b_kk, b_vv, UPDATE: tl.constexpr, GATED: tl.constexpr
):
    """I = sqrt(2 - 2 cos), the cosine 0 where a side is zero; all arguments broadcast."""
    if UPDATE:
        b_decay = tl.exp(b_g)
        b_gain = norm_gain(b_matched, b_recalled, b_g, b_erase, b_write, b_kk, b_vv, GATED)
        b_inner = b_decay * b_norm + b_write * b_matched
        if GATED:
            b_inner -= b_decay * b_erase * b_recalled
        b_size = (b_decay * b_decay * b_norm + b_gain) * b_norm
    else:
        b_inner = b_matched
        b_size = b_kk * b_vv * b_norm
    m_size = b_size > 0
    b_cosine = tl.where(m_size, b_inner * tl.rsqrt(tl.where(m_size, b_size, 1.0)), 0.0)
    return tl.sqrt_rn(tl.maximum(2 - 2 * b_cosine, 0.0))


@triton.jit
def row_products(p_x, p_y, m_x, m_y, row, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """x y^T [C, C] float32 of the rows from p_x and p_y on, `row` elements apart; rows not in m_x, m_y count as 0."""
    o_r = tl.arange(0, C) * row
    b_xy = tl.zeros([C, C], tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        b_x = tl.load(p_x + (o_r[:, None] + o_d[None, :]), mask=m_x[:, None] & m_d[None, :], other=0.0)
        b_y = tl.load(p_y + (o_r[None, :] + o_d[:, None]), mask=m_y[None, :] & m_d[:, None], other=0.0)
        b_xy = tl.dot(b_x, b_y, b_xy, input_precision=PRECISION)
    return b_xy


@triton.jit
def diagonal(b_x, C: tl.constexpr):
    """Diagonal [C] of b_x [C, C]."""
    o_c = tl.arange(0, C)
    return tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_x, 0.0), 1)


@triton.jit
def recalled_norm(b_recall, b_values, b_vv, b_others, C: tl.constexpr, PRECISION: tl.constexpr):
    """|r_a|^2 + 2 r_a . z [t, a] of r_a = sum_{l >= a} recall[t, l] v_l, with b_values = v v^T and b_vv = |v|^2 of the
    tokens l, and b_others = z . v_l [t, l]."""
    o_c = tl.arange(0, C)
    b_later = tl.where(o_c[:, None] > o_c[None, :], b_values, 0.0)
    b_others = tl.dot(b_recall, b_later, b_others, input_precision=PRECISION)
    return tl.cumsum(b_recall * (2 * b_others + b_recall * b_vv[None, :]), 1, reverse=True)


@triton.jit
def pick_row(b_x, i_row, C: tl.constexpr):
    """Row i_row [C] of b_x [C, C]."""
    return tl.sum(tl.where((tl.arange(0, C) == i_row)[:, None], b_x, 0.0), 0)


@triton.jit
def pick_column(b_x, i_column, C: tl.constexpr):
    """Column i_column [C] of b_x [C, C]."""
    return tl.sum(tl.where((tl.arange(0, C) == i_column)[None, :], b_x, 0.0), 1)


@triton.jit
def chunk_end(p_start, b_cum, o_t, i_b, i_n, T, C: tl.constexpr):
    """(G at the chunk's end, e^(G_end - G) [C] of the tokens that are of the last one's document, else 0)."""
    b_end = tl.sum(tl.where(tl.arange(0, C) == C - 1, b_cum, 0.0), 0)
    m_end = o_t >= tl.load(p_start + i_b * T + tl.minimum(i_n * C + C - 1, T - 1))
    return b_end, tl.where(m_end, tl.exp(tl.where(m_end, b_end - b_cum, 0.0)), 0.0)


@triton.jit(do_not_specialize=["T", "H", "HK", "first_chunk", "chunks", "ring"])
def drift_tables_kernel(
    p_k, p_v, p_log_decay, p_beta, p_start, p_tau, p_matrix,
    p_terms, p_steps, p_score, p_recall, T, H, HK, first_chunk, chunks, ring,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UPDATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk's own tables: rows CUM to END_NORM of terms, JUMP and LAST of steps, and the scores that walks meet.

    score [B,H,R,2,C,C] gets table 0. With beta also recall [B,H,R,C,C].
    """
    GATED: tl.constexpr = p_beta is not None
    i_b, i_h, i_n, i_o = program_chunk(H, chunks, first_chunk, ring)
    o_c = tl.arange(0, C)
    o_t = i_n * C + o_c
    m_t = o_t < T
    p_k += ((i_b * T + i_n * C) * HK + i_h // (H // HK)) * K
    p_v += ((i_b * T + i_n * C) * H + i_h) * V
    b_recall = row_products(p_k, p_k, m_t, m_t, HK * K, K, BK, C, PRECISION)
    b_values = row_products(p_v, p_v, m_t, m_t, H * V, V, BV, C, PRECISION)
    b_kk, b_vv = diagonal(b_recall, C), diagonal(b_values, C)

    # What a token needs besides is loaded after the long products, which leave no registers to hold it.
    o_t, m_t, b_start = tokens_of(p_start, i_b, i_n, T, C)
    b_g, b_erase, b_write = gates_of(p_log_decay, p_beta, i_b, i_h, o_t, m_t, T, H)
    m_sees = sees_earlier(o_t, m_t, b_start)
    b_before = tl.sum(tl.where(m_sees, b_g[None, :], 0.0), 1)
    b_cum = b_before + b_g
    b_decay = decay_between(b_before, b_cum, m_sees)
    b_recall *= b_decay
    if GATED:
        p_matrix += ((i_b * H + i_h) * chunks + i_n - first_chunk) * C * C
        o_tile = o_c[:, None] * C + o_c[None, :]
        b_recall = tl.dot(b_recall, tl.load(p_matrix + o_tile), input_precision=PRECISION)
        tl.store(p_recall + i_o * C * C + o_tile, b_recall)
    b_matched = tl.cumsum(b_recall * b_values, 1, reverse=True)
    b_recalled = b_matched
    if GATED:
        b_recalled = recalled_norm(b_recall, b_values, b_vv, tl.zeros_like(b_values), C, PRECISION)
    b_gain = norm_gain(
        b_matched, b_recalled, b_g[:, None], b_erase[:, None], b_write[:, None], b_kk[:, None], b_vv[:, None], GATED
    )
    b_gain = tl.where(o_c[:, None] >= o_c[None, :], b_gain, 0.0)
    b_norm = tl.dot(b_decay * b_decay, b_gain, input_precision=PRECISION)
    b_score = drift_score(
        b_matched, b_recalled, b_norm, b_g[:, None], b_erase[:, None], b_write[:, None], b_kk[:, None], b_vv[:, None],
        UPDATE, GATED,
    )  # fmt: skip

    m_hit = ((b_score >= tl.load(p_tau + i_h)) | (o_t == b_start)[:, None]) & m_t[:, None]
    m_later = o_c[:, None] > o_c[None, :]
    b_jump = tl.min(tl.where(m_hit & m_later, o_c[:, None], C), 0)
    m_met = m_later & (o_c[:, None] <= b_jump[None, :])
    tl.store(p_score + 2 * i_o * C * C + (o_c[:, None] * C + o_c[None, :]), b_score, mask=m_met)
    p_steps += i_o * STEPS * C + o_c
    tl.store(p_steps + JUMP * C, b_jump)
    # By way of memory, for one element a lane: a gather costs as many shuffles as a lane holds elements, squared.
    tl.debug_barrier()
    b_jump = tl.load(p_steps + JUMP * C)
    b_last = tl.where(b_jump < C, b_jump, o_c)
    for _ in tl.static_range(5):  # walks of 2^5 steps, C at most
        b_last = tl.gather(b_last, b_last, 0)
    tl.store(p_steps + LAST * C, b_last)

    p_terms += i_o * TERMS * C + o_c
    b_end_norm = pick_row(tl.exp(2 * b_g)[:, None] * b_norm + b_gain, C - 1, C)
    tl.store(p_terms + CUM * C, b_cum)
    tl.store(p_terms + KEY_NORM * C, b_kk)
    tl.store(p_terms + VALUE_NORM * C, b_vv)
    tl.store(p_terms + MATCHED * C, pick_column(b_matched, 0, C))
    tl.store(p_terms + RECALLED * C, pick_column(b_recalled, 0, C))
    tl.store(p_terms + END_NORM * C, b_end_norm)


@triton.jit(do_not_specialize=["T", "H", "HK", "first_chunk", "chunks", "ring"])
def drift_keys_kernel(
    p_k, p_log_decay, p_start, p_matrix, p_terms, p_recall, p_key_open, p_key_end, T, H, HK, first_chunk, chunks, ring,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys [B,H,R,C,K] by which a chunk's tokens read the state it was entered with, and stand in the one it leaves."""
    i_b, i_h, i_n, i_o = program_chunk(H, chunks, first_chunk, ring)
    o_c = tl.arange(0, C)
    o_t = i_n * C + o_c
    m_t = o_t < T
    p_k += ((i_b * T + i_n * C) * HK + i_h // (H // HK)) * K
    p_matrix += ((i_b * H + i_h) * chunks + i_n - first_chunk) * C * C
    b_matrix_t = tl.load(p_matrix + (o_c[None, :] * C + o_c[:, None]))
    b_recall = tl.load(p_recall + i_o * C * C + (o_c[:, None] * C + o_c[None, :]))
    b_cum = tl.load(p_terms + (i_o * TERMS + CUM) * C + o_c)
    b_g = tl.load(p_log_decay + (i_b * T + o_t) * H + i_h, mask=m_t, other=0.0).to(tl.float32)
    _, b_to_end = chunk_end(p_start, b_cum, o_t, i_b, i_n, T, C)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        o_in = (o_c * (HK * K))[:, None] + o_k[None, :]
        b_k = tl.load(p_k + o_in, mask=m_t[:, None] & m_k, other=0.0).to(tl.float32)
        b_open = tl.exp(b_cum - b_g)[:, None] * b_k
        b_open -= tl.dot(b_recall, tl.exp(b_cum)[:, None] * b_k, input_precision=PRECISION)
        b_end = tl.dot(b_matrix_t, b_to_end[:, None] * b_k, input_precision=PRECISION)
        o_out = i_o * C * K + (o_c[:, None] * K + o_k[None, :])
        tl.store(p_key_open + o_out, b_open, mask=m_k)
        tl.store(p_key_end + o_out, b_end, mask=m_k)


@triton.jit(do_not_specialize=["T", "H", "HK", "first_chunk", "chunks", "ring"])
def drift_links_kernel(
    p_k, p_v, p_log_decay, p_beta, p_start, p_tau,
    p_terms, p_steps, p_score, p_recall, p_key_open, p_key_end, T, H, HK, first_chunk, chunks, ring,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UPDATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk against openings in the chunk before it: FIRST and AFTER of steps, and table 1 of score."""
    GATED: tl.constexpr = p_beta is not None
    i_b, i_h, i_n, i_o = program_chunk(H, chunks, first_chunk, ring)
    i_e = (i_b * H + i_h) * ring + (i_n - 1) % ring
    o_c = tl.arange(0, C)
    o_t = i_n * C + o_c
    m_t = o_t < T
    m_l = tl.full([C], True, tl.int1)
    p_k += ((i_b * T + i_n * C) * HK + i_h // (H // HK)) * K
    p_v += ((i_b * T + i_n * C) * H + i_h) * V
    p_w = p_v - C * H * V
    # What a token needs of its own is loaded after the long products, which leave no registers to hold it.
    b_across = row_products(p_v, p_w, m_t, m_l, H * V, V, BV, C, PRECISION)
    if GATED:
        b_own = tl.load(p_recall + i_o * C * C + (o_c[:, None] * C + o_c[None, :]))
        b_others = tl.dot(b_own, b_across, input_precision=PRECISION)
        b_values = row_products(p_w, p_w, m_l, m_l, H * V, V, BV, C, PRECISION)
        b_recall = row_products(p_key_open + i_o * C * K, p_key_end + i_e * C * K, m_l, m_l, K, K, BK, C, PRECISION)
    else:
        b_recall = row_products(p_k, p_k - C * HK * K, m_t, m_l, HK * K, K, BK, C, PRECISION)
    o_t, m_t, b_start = tokens_of(p_start, i_b, i_n, T, C)
    b_g, b_erase, b_write = gates_of(p_log_decay, p_beta, i_b, i_h, o_t, m_t, T, H)
    p_own = p_terms + i_o * TERMS * C + o_c
    p_past = p_terms + i_e * TERMS * C + o_c
    b_cum = tl.load(p_own + CUM * C)
    if not GATED:
        _, b_to_end = chunk_end(p_start, tl.load(p_past + CUM * C), o_t - C, i_b, i_n - 1, T, C)
        b_recall *= tl.exp(b_cum - b_g)[:, None] * b_to_end[None, :]
    b_matched = tl.load(p_own + MATCHED * C)[:, None] + tl.cumsum(b_recall * b_across, 1, reverse=True)
    b_recalled = b_matched
    if GATED:
        b_recalled = recalled_norm(b_recall, b_values, tl.load(p_past + VALUE_NORM * C), b_others, C, PRECISION)
        b_recalled += tl.load(p_own + RECALLED * C)[:, None]
    b_kk = tl.load(p_own + KEY_NORM * C)
    b_vv = tl.load(p_own + VALUE_NORM * C)
    b_gain = norm_gain(
        b_matched, b_recalled, b_g[:, None], b_erase[:, None], b_write[:, None], b_kk[:, None], b_vv[:, None], GATED
    )
    b_decay = decay_between(b_cum - b_g, b_cum, sees_earlier(o_t, m_t, b_start))
    b_norm = tl.exp(2 * (b_cum - b_g))[:, None] * tl.load(p_past + END_NORM * C)[None, :]
    b_norm = tl.dot(b_decay * b_decay, b_gain, b_norm, input_precision=PRECISION)
    b_score = drift_score(
        b_matched, b_recalled, b_norm, b_g[:, None], b_erase[:, None], b_write[:, None], b_kk[:, None], b_vv[:, None],
        UPDATE, GATED,
    )  # fmt: skip

    m_hit = ((b_score >= tl.load(p_tau + i_h)) | (o_t == b_start)[:, None]) & m_t[:, None]
    b_first = tl.min(tl.where(m_hit, o_c[:, None], C), 0)
    b_after = tl.load(p_steps + (i_o * STEPS + LAST) * C + b_first, mask=b_first < C, other=-1)
    m_left = tl.load(p_steps + (i_e * STEPS + JUMP) * C + o_c) == C
    m_met = m_left[None, :] & (o_c[:, None] <= b_first[None, :])
    tl.store(p_score + (2 * i_o + 1) * C * C + (o_c[:, None] * C + o_c[None, :]), b_score, mask=m_met)
    tl.store(p_steps + (i_o * STEPS + FIRST) * C + o_c, b_first)
    tl.store(p_steps + (i_o * STEPS + AFTER) * C + o_c, b_after)
