# mypy: disable-error-code="no-untyped-def"
"""From drift tables to boundaries: which opening each chunk is entered with, and the walk inside it (docs/dla.md 6).

A chunk whose open segment began in the chunk before it costs one look-up in the tables of drift_tables_triton.py. One
that is entered with an older segment (*long*) needs that segment's state. So that this state, too, is made by all of
the machine and not by one program a head, the chain of openings is first guessed: a long segment is taken to score as
if it had begun at the first token of the chunk before, which decay makes almost true. `drift_states` and
`drift_entry` then make the states and scores of the long chunks of that guess in parallel, and the second walk uses
those whose opening it finds to be the true one. Where the guess was wrong it makes state and scores itself, by the
same steps, so a guess decides about time and not about results (but their last bit, where tiles are of another size).
"""

from __future__ import annotations

import triton
import triton.language as tl

from dla_kernels.memory.drift_tables_triton import (
    AFTER,
    CUM,
    ENTRY_SCORE,
    FIRST,
    JUMP,
    KEY_NORM,
    LAST,
    MATCHED,
    RECALLED,
    STEPS,
    TERMS,
    VALUE_NORM,
    chunk_end,
    decay_between,
    drift_score,
    gates_of,
    norm_gain,
    program_chunk,
    sees_earlier,
    tokens_of,
)

# Rows of the workspace `entry` [B, H, R, ENTRY] int32.
ASSUMED: tl.constexpr = tl.constexpr(0)  # token that opened the segment the chunk was entered with, by the guess
FOUND: tl.constexpr = tl.constexpr(1)  # first boundary of a chunk entered long (C: none)
ENTRY: tl.constexpr = tl.constexpr(2)

BEFORE_ROW: tl.constexpr = tl.constexpr(2)
"""Entries of `newest` [B, H, 2 + N] that stand for chunks before the row's first, which is entered long."""


@triton.jit
def _ring_place(i_bh, i_n, ring):
    """Place of chunk i_n in the workspace."""
    return i_bh * ring + i_n % ring


@triton.jit
def key_tile(p_k, p_keys, b_factor, i_b, i_h, i_n, i_o, o_k, o_c, T, H, HK, K: tl.constexpr, C: tl.constexpr):
    """Keys in float32 of tokens o_c of chunk i_n, at place i_o: p_keys [B,H,R,C,K], or b_factor k where it is None.

    o_k, o_c and b_factor are oriented by the caller, [1, BK] by [C, 1] or the other way round.
    """
    if p_keys is None:
        p_k += ((i_b * T + i_n * C) * HK + i_h // (H // HK)) * K
        m_tile = (o_c < T - i_n * C) & (o_k < K)
        return b_factor * tl.load(p_k + (o_c * (HK * K) + o_k), mask=m_tile, other=0.0).to(tl.float32)
    else:
        return tl.load(p_keys + i_o * C * K + (o_c * K + o_k), mask=o_k < K, other=0.0)


@triton.jit
def value_tile(p_v, i_b, i_h, i_n, o_v, o_c, T, H, V: tl.constexpr, C: tl.constexpr):
    """Values in float32 of tokens o_c of chunk i_n, oriented by the caller."""
    p_v += ((i_b * T + i_n * C) * H + i_h) * V
    m_tile = (o_c < T - i_n * C) & (o_v < V)
    return tl.load(p_v + (o_c * (H * V) + o_v), mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def state_tile(p_states, i_o, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """Entering state of the chunk at place i_o, oriented by the caller."""
    return tl.load(p_states + i_o * K * V + (o_k * V + o_v), mask=(o_k < K) & (o_v < V), other=0.0)


@triton.jit
def enter_chunk(
    p_k, p_v, p_start, p_terms, p_key_end, p_states, i_b, i_h, i_n, i_began, o_v, T, H, HK, ring,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns o_v of the state that chunk i_n > 0 is entered with, given that it is entered long.

    From the state before it, which is made first where the segment began in chunk i_n - 2: at i_began, else -1.
    """
    i_bh = i_b * H + i_h
    o_c = tl.arange(0, C)
    i_o, i_e = _ring_place(i_bh, i_n, ring), _ring_place(i_bh, i_n - 1, ring)
    if i_began >= 0:
        i_s = _ring_place(i_bh, i_n - 2, ring)
        b_cum = tl.load(p_terms + (i_s * TERMS + CUM) * C + o_c)
        _, b_to_end = chunk_end(p_start, b_cum, (i_n - 2) * C + o_c, i_b, i_n - 2, T, C)
        b_v = value_tile(p_v, i_b, i_h, i_n - 2, o_v[None, :], o_c[:, None], T, H, V, C)
        b_v = tl.where((o_c >= i_began)[:, None], b_v, 0.0)
        for i_k in range(0, K, BK):
            o_k = i_k + tl.arange(0, BK)
            b_key = key_tile(
                p_k, p_key_end, b_to_end[None, :], i_b, i_h, i_n - 2, i_s, o_k[:, None], o_c[None, :],
                T, H, HK, K, C,
            )  # fmt: skip
            b_s = tl.dot(b_key, b_v, input_precision=PRECISION)
            p_tile = p_states + i_e * K * V + (o_k[:, None] * V + o_v[None, :])
            tl.store(p_tile, b_s, mask=(o_k < K)[:, None] & (o_v < V)[None, :])
        tl.debug_barrier()
    b_cum = tl.load(p_terms + (i_e * TERMS + CUM) * C + o_c)
    b_end, b_to_end = chunk_end(p_start, b_cum, (i_n - 1) * C + o_c, i_b, i_n - 1, T, C)
    b_v = value_tile(p_v, i_b, i_h, i_n - 1, o_v[None, :], o_c[:, None], T, H, V, C)
    if p_key_end is not None:
        b_read = tl.zeros([C, BV], tl.float32)
        for i_k in range(0, K, BK):
            o_k = i_k + tl.arange(0, BK)
            b_key = key_tile(
                p_k, None, tl.exp(b_cum)[:, None], i_b, i_h, i_n - 1, i_e, o_k[None, :], o_c[:, None],
                T, H, HK, K, C,
            )  # fmt: skip
            b_s = state_tile(p_states, i_e, o_k[:, None], o_v[None, :], K, V)
            b_read = tl.dot(b_key, b_s, b_read, input_precision=PRECISION)
        b_v -= b_read
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_key = key_tile(
            p_k, p_key_end, b_to_end[None, :], i_b, i_h, i_n - 1, i_e, o_k[:, None], o_c[None, :],
            T, H, HK, K, C,
        )  # fmt: skip
        b_s = tl.exp(b_end) * state_tile(p_states, i_e, o_k[:, None], o_v[None, :], K, V)
        b_s = tl.dot(b_key, b_v, b_s, input_precision=PRECISION)
        p_tile = p_states + i_o * K * V + (o_k[:, None] * V + o_v[None, :])
        tl.store(p_tile, b_s, mask=(o_k < K)[:, None] & (o_v < V)[None, :])
    tl.debug_barrier()


@triton.jit
def score_entry(
    p_k, p_v, p_log_decay, p_beta, p_start, p_tau, p_terms, p_recall, p_key_open, p_states, p_entry, p_entry_norm,
    i_b, i_h, i_n, T, H, HK, ring,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UPDATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Score chunk i_n against the state it is entered with: FOUND, entry_norm [B,H,R] and row ENTRY_SCORE of terms."""
    GATED: tl.constexpr = p_beta is not None
    i_bh = i_b * H + i_h
    i_o = _ring_place(i_bh, i_n, ring)
    o_c = tl.arange(0, C)
    o_t, m_t, b_start = tokens_of(p_start, i_b, i_n, T, C)
    b_g, b_erase, b_write = gates_of(p_log_decay, p_beta, i_b, i_h, o_t, m_t, T, H)
    p_own = p_terms + i_o * TERMS * C + o_c
    b_cum = tl.load(p_own + CUM * C)
    b_kk = tl.load(p_own + KEY_NORM * C)
    b_vv = tl.load(p_own + VALUE_NORM * C)
    b_matched = tl.load(p_own + MATCHED * C)
    b_recalled = tl.load(p_own + RECALLED * C)
    b_squares = tl.zeros([BV], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_read = tl.zeros([C, BV], tl.float32)
        for i_k in range(0, K, BK):
            o_k = i_k + tl.arange(0, BK)
            b_key = key_tile(
                p_k, p_key_open, tl.exp(b_cum - b_g)[:, None], i_b, i_h, i_n, i_o, o_k[None, :], o_c[:, None],
                T, H, HK, K, C,
            )  # fmt: skip
            b_s = state_tile(p_states, i_o, o_k[:, None], o_v[None, :], K, V)
            b_squares += tl.sum(b_s * b_s, 0)
            b_read = tl.dot(b_key, b_s, b_read, input_precision=PRECISION)
        b_v = value_tile(p_v, i_b, i_h, i_n, o_v[None, :], o_c[:, None], T, H, V, C)
        b_matched += tl.sum(b_read * b_v, 1)
        if GATED:
            b_recall = tl.load(p_recall + i_o * C * C + (o_c[:, None] * C + o_c[None, :]))
            b_own = tl.dot(b_recall, b_v, input_precision=PRECISION)
            b_recalled += tl.sum(b_read * (2 * b_own + b_read), 1)
    b_state_norm = tl.sum(b_squares, 0)
    b_gain = norm_gain(b_matched, b_recalled, b_g, b_erase, b_write, b_kk, b_vv, GATED)
    b_decay = decay_between(b_cum - b_g, b_cum, sees_earlier(o_t, m_t, b_start))
    b_norm = tl.exp(2 * (b_cum - b_g)) * b_state_norm + tl.sum(b_decay * b_decay * b_gain[None, :], 1)
    b_score = drift_score(b_matched, b_recalled, b_norm, b_g, b_erase, b_write, b_kk, b_vv, UPDATE, GATED)
    m_hit = ((b_score >= tl.load(p_tau + i_h)) | (o_t == b_start)) & m_t
    tl.store(p_own + ENTRY_SCORE * C, b_score)
    tl.store(p_entry + i_o * ENTRY + FOUND, tl.min(tl.where(m_hit, o_c, C), 0))
    tl.store(p_entry_norm + i_o, b_state_norm)


@triton.jit(do_not_specialize=["H", "first_chunk", "chunks", "ring", "chunks_in_row"])
def drift_guess_kernel(
    p_steps, p_newest, p_opened, p_entry, H, first_chunk, chunks, ring, chunks_in_row, C: tl.constexpr
):
    """newest [B,H,2+N] by the guess of the header, one head a program, and ASSUMED for the chunks it finds long."""
    i_bh = tl.program_id(0).to(tl.int64)
    p_newest += i_bh * (BEFORE_ROW + chunks_in_row) + BEFORE_ROW
    i_newest = tl.load(p_newest + first_chunk - 1)
    i_opened = tl.load(p_opened + i_bh)
    for i in range(chunks):
        i_n = first_chunk + i
        i_o = i_bh * ring + i_n % ring
        tl.store(p_entry + i_o * ENTRY + ASSUMED, i_opened)
        p_row = p_steps + (i_o * STEPS + AFTER) * C
        if i_n == 0:
            p_row = p_steps + (i_o * STEPS + LAST) * C
        i_newest = tl.load(p_row + tl.maximum(i_newest, 0))
        if i_newest >= 0:
            i_opened = i_n * C + i_newest
        tl.store(p_newest + i_n, i_newest)


@triton.jit(do_not_specialize=["T", "H", "HK", "first_chunk", "chunks", "ring", "chunks_in_row"])
def drift_states_kernel(
    p_k, p_v, p_start, p_terms, p_key_end, p_newest, p_states, T, H, HK, first_chunk, chunks, ring, chunks_in_row,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """states [B,H,R,K,V] of the chunks that the guess enters long; columns of one head a program."""
    TILES: tl.constexpr = tl.cdiv(V, BV)
    i_p = tl.program_id(0)
    i_bh = i_p // TILES
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_v = (i_p % TILES) * BV + tl.arange(0, BV)
    p_row = p_newest + (i_b * H + i_h) * (BEFORE_ROW + chunks_in_row) + BEFORE_ROW
    for i in range(chunks):
        i_n = tl.cast(first_chunk + i, tl.int64)
        if (i_n > 0) & (tl.load(p_row + i_n - 1) < 0):
            enter_chunk(
                p_k, p_v, p_start, p_terms, p_key_end, p_states, i_b, i_h, i_n, tl.load(p_row + i_n - 2), o_v,
                T, H, HK, ring, K, V, C, BK, BV, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "HK", "first_chunk", "chunks", "ring", "chunks_in_row"])
def drift_entry_kernel(
    p_k, p_v, p_log_decay, p_beta, p_start, p_tau, p_terms, p_recall, p_key_open, p_newest, p_states, p_entry,
    p_entry_norm, T, H, HK, first_chunk, chunks, ring, chunks_in_row,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UPDATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`score_entry` of every chunk that the guess enters long."""
    i_b, i_h, i_n, _ = program_chunk(H, chunks, first_chunk, ring)
    if tl.load(p_newest + (i_b * H + i_h) * (BEFORE_ROW + chunks_in_row) + BEFORE_ROW + i_n - 1) < 0:
        score_entry(
            p_k, p_v, p_log_decay, p_beta, p_start, p_tau, p_terms, p_recall, p_key_open, p_states, p_entry,
            p_entry_norm, i_b, i_h, i_n, T, H, HK, ring, K, V, C, BK, BV, UPDATE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "HK", "first_chunk", "chunks", "ring", "chunks_in_row"])
def drift_walk_kernel(
    p_k, p_v, p_log_decay, p_beta, p_start, p_tau, p_terms, p_steps, p_recall, p_key_open, p_key_end,
    p_newest, p_opened, p_states, p_entry, p_entry_norm, T, H, HK, first_chunk, chunks, ring, chunks_in_row,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UPDATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """newest [B,H,2+N], each chunk's last boundary (-1: none), one head a program.

    opened [B,H] int32 is the token that opened the segment which the first of these chunks is entered with (-1: a
    carried one), and is moved on to that of the next one's.
    """
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_bh = i_b * H + i_h
    p_row = p_newest + i_bh * (BEFORE_ROW + chunks_in_row) + BEFORE_ROW
    i_before = tl.load(p_row + first_chunk - 2)
    i_newest = tl.load(p_row + first_chunk - 1)
    i_opened = tl.load(p_opened + i_bh)
    for i in range(chunks):
        i_n = tl.cast(first_chunk + i, tl.int64)
        i_o = i_bh * ring + (first_chunk + i) % ring
        i_began, i_before = i_before, i_newest
        if i_newest >= 0:
            i_newest = tl.load(p_steps + (i_o * STEPS + AFTER) * C + i_newest)
        else:
            if tl.load(p_entry + i_o * ENTRY + ASSUMED) != i_opened:
                if i_n > 0:
                    for i_v in range(0, V, BV):
                        enter_chunk(
                            p_k, p_v, p_start, p_terms, p_key_end, p_states, i_b, i_h, i_n, i_began,
                            i_v + tl.arange(0, BV), T, H, HK, ring, K, V, C, BK, BV, PRECISION,
                        )  # fmt: skip
                score_entry(
                    p_k, p_v, p_log_decay, p_beta, p_start, p_tau, p_terms, p_recall, p_key_open, p_states, p_entry,
                    p_entry_norm, i_b, i_h, i_n, T, H, HK, ring, K, V, C, BK, BV, UPDATE, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
            i_first = tl.load(p_entry + i_o * ENTRY + FOUND)
            i_newest = tl.load(p_steps + (i_o * STEPS + LAST) * C + i_first, mask=i_first < C, other=-1)
        if i_newest >= 0:
            i_opened = (first_chunk + i) * C + i_newest
        tl.store(p_row + i_n, i_newest)
    tl.debug_barrier()  # every warp has read what the walk began with, by which it branches
    tl.store(p_opened + i_bh, i_opened)


@triton.jit(do_not_specialize=["T", "H", "first_chunk", "chunks", "ring", "chunks_in_row"])
def drift_follow_kernel(
    p_start, p_terms, p_steps, p_score, p_newest, p_entry, p_boundary, p_out_score,
    T, H, first_chunk, chunks, ring, chunks_in_row, C: tl.constexpr,
):  # fmt: skip
    """boundary [B,H,T] uint8 and score [B,H,T] float32 of one chunk: the walk from its first boundary."""
    i_b, i_h, i_n, i_o = program_chunk(H, chunks, first_chunk, ring)
    o_c = tl.arange(0, C)
    o_t, m_t, b_start = tokens_of(p_start, i_b, i_n, T, C)
    i_newest = tl.load(p_newest + (i_b * H + i_h) * (BEFORE_ROW + chunks_in_row) + BEFORE_ROW + i_n - 1)
    p_steps += i_o * STEPS * C
    p_first = p_steps + FIRST * C + i_newest
    if i_newest < 0:
        p_first = p_entry + i_o * ENTRY + FOUND
    i_at = tl.load(p_first)
    b_opening = tl.full([C], -1, tl.int32)
    b_boundary = tl.zeros([C], tl.int32)
    while i_at < C:
        b_boundary = tl.where(o_c == i_at, 1, b_boundary)
        b_opening = tl.where(o_c > i_at, i_at, b_opening)
        i_at = tl.load(p_steps + JUMP * C + i_at)
    m_entered = b_opening < 0
    p_table = p_score + (2 * i_o * C + o_c) * C
    b_score = tl.load(p_table + b_opening, mask=m_t & (b_opening >= 0), other=0.0)
    b_score += tl.load(p_table + C * C + i_newest, mask=m_t & m_entered & (i_newest >= 0), other=0.0)
    b_score += tl.load(
        p_terms + (i_o * TERMS + ENTRY_SCORE) * C + o_c, mask=m_t & m_entered & (i_newest < 0), other=0.0
    )
    p_token = (i_b * H + i_h) * T + o_t
    tl.store(p_boundary + p_token, b_boundary.to(tl.uint8), mask=m_t)
    tl.store(p_out_score + p_token, tl.where(o_t == b_start, 0.0, b_score), mask=m_t)
