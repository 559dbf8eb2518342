"""Slot affinity in Triton, forward and backward (memory/affinity.py; docs/dla.md section 2.5).

    affinity[t, r] = rho_t . (sum of kappa over the slot of rank r at t) / (its tokens)

Key sums pass from chunk edge to chunk edge as states do: what a chunk's tokens add is found in parallel, one light
sequential pass per head and block of columns carries it on, and all edges are kept while a direction runs:
4 (N + 1) S R bytes a head in float32, made again in backward rather than kept. A slot holds the tokens from its start
to the next one's, so the starts of two edges say where slots and tokens went, and counts need no sums. Inside a chunk
old slots and tokens lie in the order of time: a sum by rank is a sum over neighbours, from one boundary alive to the
next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dla_kernels.launch import cdiv, dot_precision, eager, launch, power_of_2, tuning
from dla_kernels.memory.table import SlotTable
from dla_kernels.memory.table_triton import (
    FAR,
    alive_tokens,
    boundary_ranks,
    chunk_block,
    chunk_row,
    load_slots,
    load_tokens,
    reads_slots,
    store_by_rank,
)


@triton.jit
def _load_span(p_start, i_edge, o_s, S: tl.constexpr):
    """(first token, first token of the next slot) [BS] of the slots at an edge; FAR where there is none."""
    b_first = tl.load(p_start + i_edge * S + o_s, mask=o_s < S, other=FAR)
    return b_first, tl.load(p_start + i_edge * S + o_s + 1, mask=o_s + 1 < S, other=FAR)


@triton.jit
def _chunk_program(N, R: tl.constexpr, BR: tl.constexpr):
    """(row, chunk, columns o_c [BR]) of a program on a block of columns of a chunk; rows are what is left."""
    i = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (R + BR - 1) // BR
    o_c = (i % blocks).to(tl.int32) * BR + tl.arange(0, BR)
    return i // blocks // N, (i // blocks) % N, o_c


@triton.jit(do_not_specialize=["T", "H", "N", "GK"])
def key_sums_added_kernel(
    p_kappa, p_start, p_sums, T, H, N, GK,
    R: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk's tokens add to each slot of the edge after it."""
    i_bh, i_n, o_c = _chunk_program(N, R, BR)
    o_s = tl.arange(0, BS)
    o_l = tl.arange(0, BC)
    b_l = (i_n * C).to(tl.int32) + o_l
    m_l = (o_l < C) & (b_l < T)
    b_first, b_after = _load_span(p_start, i_bh * (N + 1) + i_n + 1, o_s, S)
    m_in = (b_first[:, None] <= b_l[None, :]) & (b_l[None, :] < b_after[:, None])
    p_kappa += ((i_bh // H * T + i_n * C) * (H // GK) + i_bh % H // GK) * R
    m_kappa = m_l[:, None] & (o_c < R)[None, :]
    b_kappa = tl.load(p_kappa + (o_l[:, None] * (H // GK * R) + o_c[None, :]), mask=m_kappa, other=0.0)
    b_sums = tl.dot(m_in.to(b_kappa.dtype), b_kappa, input_precision=PRECISION)
    p_sums += (i_bh * (N + 1) + i_n + 1) * S * R
    tl.store(p_sums + (o_s[:, None] * R + o_c[None, :]), b_sums, mask=(o_s < S)[:, None] & (o_c < R)[None, :])


@triton.jit(do_not_specialize=["N"])
def key_sums_carried_kernel(
    p_key_sums, p_start, p_sums, N,
    R: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Carry the sums over edges, in place: row n + 1 holds what chunk n adds."""
    blocks: tl.constexpr = (R + BR - 1) // BR
    i_bh = tl.program_id(0).to(tl.int64) // blocks
    o_s = tl.arange(0, BS)
    o_c = (tl.program_id(0) % blocks) * BR + tl.arange(0, BR)
    m_x = (o_s < S)[:, None] & (o_c < R)[None, :]
    o_x = o_s[:, None] * R + o_c[None, :]
    i_edge = i_bh * (N + 1)
    b_start, _ = _load_span(p_start, i_edge, o_s, S)
    b_sums = tl.zeros([BS, BR], tl.float32)
    if p_key_sums is not None:
        b_sums = tl.load(p_key_sums + i_bh * S * R + o_x, mask=m_x & (b_start < FAR)[:, None], other=0.0)
        b_sums = b_sums.to(tl.float32)
    tl.store(p_sums + i_edge * S * R + o_x, b_sums, mask=m_x)
    for _n in range(N):
        i_edge += 1
        b_first, b_after = _load_span(p_start, i_edge, o_s, S)
        m_in = (b_first[:, None] <= b_start[None, :]) & (b_start[None, :] < b_after[:, None])
        b_added = tl.load(p_sums + i_edge * S * R + o_x, mask=m_x, other=0.0)
        # Ones and zeros are exact in any precision, so three passes in tf32 keep 22 bits of a sum.
        b_sums = b_added + tl.dot(m_in.to(tl.float32), b_sums, input_precision="tf32x3")
        tl.store(p_sums + i_edge * S * R + o_x, b_sums, mask=m_x)
        b_start = b_first


@triton.jit
def _counts_by_rank(
    p_rows, o_row, m_t, b_t, b_start, i_n, m_token, b_token, m_slot, b_slot,
    S: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Tokens of the slot of every rank [BT, BS], 0 where there is none; overwrites the rows, and waits."""
    o_r = tl.arange(0, BS)
    p_first = p_rows.to(tl.pointer_type(tl.int32), bitcast=True)
    b_l = (i_n * C).to(tl.int32) + tl.arange(0, BC)
    store_by_rank(p_first, o_row, m_t, m_token, b_token, b_l, m_slot, b_slot, b_start, FAR, 0, S, BS)
    o_x = o_row[:, None] + o_r[None, :]
    m_x = m_t[:, None] & (o_r < S)[None, :]
    b_first = tl.load(p_first + o_x, mask=m_x, other=FAR)
    b_after = tl.load(p_first + o_x - 1, mask=m_x & (o_r > 0)[None, :], other=0)
    b_after = tl.where(o_r[None, :] == 0, b_t[:, None] + 1, b_after)
    tl.debug_barrier()
    return tl.where(b_first < FAR, b_after - b_first, 0)


@triton.jit
def _restart(m, x, m_next, x_next):
    """Running sum x that starts again wherever m_next."""
    return m | m_next, tl.where(m_next != 0, x_next, x + x_next)


@triton.jit(do_not_specialize=["T", "H", "N", "GQ", "GK"])
def affinity_read_kernel(
    p_rho, p_kappa, p_sums, p_start, p_death, p_token_death, p_document_start, p_out, T, H, N, GQ, GK,
    R: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    BR: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Affinities of a block of a chunk's tokens; `p_out` first holds the slots' first tokens, then their sums."""
    i_bh, i_n, o_t = chunk_block(N, C, BT)
    o_s = tl.arange(0, BS)
    o_l = tl.arange(0, BC)
    b_l = (i_n * C).to(tl.int32) + o_l
    m_l = (o_l < C) & (b_l < T)
    b_t, b_d, m_t = load_tokens(p_document_start, i_bh // H, i_n, o_t, T, C)

    p_rho += ((i_bh // H * T + i_n * C) * (H // GQ) + i_bh % H // GQ) * R
    p_kappa += ((i_bh // H * T + i_n * C) * (H // GK) + i_bh % H // GK) * R
    p_sums += (i_bh * (N + 1) + i_n) * S * R
    b_inside = tl.zeros([BT, BC], tl.float32)
    b_before = tl.zeros([BT, BS], tl.float32)
    for i_r in range((R + BR - 1) // BR):
        o_c = i_r * BR + tl.arange(0, BR)
        m_c = o_c < R
        o_x = o_t[:, None] * (H // GQ * R) + o_c[None, :]
        b_rho = tl.load(p_rho + o_x, mask=m_t[:, None] & m_c[None, :], other=0.0)
        o_x = o_l[None, :] * (H // GK * R) + o_c[:, None]
        b_kappa = tl.load(p_kappa + o_x, mask=m_l[None, :] & m_c[:, None], other=0.0)
        o_x = o_s[None, :] * R + o_c[:, None]
        b_sums = tl.load(p_sums + o_x, mask=(o_s < S)[None, :] & m_c[:, None], other=0.0)
        b_inside = tl.dot(b_rho, b_kappa, b_inside, input_precision=PRECISION)
        b_before = tl.dot(b_rho.to(tl.float32), b_sums, b_before, input_precision=PRECISION)

    i_edge = i_bh * (N + 1) + i_n
    b_start, b_death = load_slots(p_start, p_death, i_edge, o_s, S)
    m_token, b_token, m_slot, b_slot, b_here = boundary_ranks(
        p_token_death, i_bh, i_n, b_start, b_death, b_t, b_d, T, C, BC
    )
    p_out += chunk_row(i_bh, i_n, T, H, S, C)
    o_row = o_t * (H * S)
    b_count = _counts_by_rank(p_out, o_row, m_t, b_t, b_start, i_n, m_token, b_token, m_slot, b_slot, S, C, BS, BC)

    m_sees = (b_l[None, :] <= b_t[:, None]) & (b_l[None, :] >= b_d[:, None])
    m_reads = reads_slots(b_start, b_d)
    b_inside = tl.where(m_sees, b_inside, 0.0)
    b_before = tl.where(m_reads, b_before, 0.0)
    # Tokens before the chunk's first boundary alive are in one slot with the newest old one.
    b_joint = tl.sum(tl.where(b_token == b_here[:, None], b_inside, 0.0), 1)
    b_joint += tl.sum(tl.where(b_slot == b_here[:, None], b_before, 0.0), 1)
    tl.store(p_out + o_row + b_here, b_joint, mask=m_t & (b_here < S))
    _, b_inside = tl.associative_scan((m_token.to(tl.int32), b_inside), 1, _restart)
    m_next = alive_tokens(p_token_death, i_bh, b_l + 1, (o_l + 1 < C) & (b_l + 1 < T), b_t, b_d, T)
    m_put = m_sees & (m_next | (b_l[None, :] == b_t[:, None])) & (b_token < tl.minimum(b_here, S)[:, None])
    tl.store(p_out + (o_row[:, None] + b_token), b_inside, mask=m_put)
    _, b_before = tl.associative_scan((m_slot.to(tl.int32), b_before), 1, _restart)
    b_start, b_death = load_slots(p_start, p_death, i_edge, o_s + 1, S)
    m_next = reads_slots(b_start, b_d) & (b_death[None, :] > b_t[:, None])
    m_put = m_reads & m_next & (b_slot > b_here[:, None]) & (b_slot < S)
    tl.store(p_out + (o_row[:, None] + b_slot), b_before, mask=m_put)
    tl.debug_barrier()
    o_x = o_row[:, None] + o_s[None, :]
    m_x = m_t[:, None] & (o_s < S)[None, :]
    b_total = tl.load(p_out + o_x, mask=m_x & (b_count > 0), other=0.0)
    tl.debug_barrier()
    b_mean = b_total / tl.maximum(b_count, 1).to(tl.float32)
    tl.store(p_out + o_x, tl.where(b_count > 0, b_mean, float("-inf")), mask=m_x)


@triton.jit(do_not_specialize=["T", "H", "N"])
def affinity_scale_kernel(
    p_d_affinity, p_start, p_death, p_token_death, p_document_start, p_d_sum, T, H, N,
    S: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Adjoint of the sums [B, T, H, S]: that of the means over the counts, 0 where no slot."""
    i_bh, i_n, o_t = chunk_block(N, C, BT)
    o_s = tl.arange(0, BS)
    b_t, b_d, m_t = load_tokens(p_document_start, i_bh // H, i_n, o_t, T, C)
    b_start, b_death = load_slots(p_start, p_death, i_bh * (N + 1) + i_n, o_s, S)
    m_token, b_token, m_slot, b_slot, _ = boundary_ranks(p_token_death, i_bh, i_n, b_start, b_death, b_t, b_d, T, C, BC)
    o_chunk = chunk_row(i_bh, i_n, T, H, S, C)
    o_row = o_t * (H * S)
    p_rows = p_d_sum + o_chunk
    b_count = _counts_by_rank(p_rows, o_row, m_t, b_t, b_start, i_n, m_token, b_token, m_slot, b_slot, S, C, BS, BC)
    o_x = o_row[:, None] + o_s[None, :]
    m_x = m_t[:, None] & (o_s < S)[None, :]
    b_d_mean = tl.load(p_d_affinity + o_chunk + o_x, mask=m_x & (b_count > 0), other=0.0).to(tl.float32)
    tl.store(p_rows + o_x, b_d_mean / tl.maximum(b_count, 1).to(tl.float32), mask=m_x)


@triton.jit
def _d_products(
    p_d_sum, p_start, p_death, p_token_death, p_document_start, i_bh, i_n, o_t, T, H, N,
    S: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Adjoints of rho_t . kappa_l [BT, BC] and of rho_t . (sum of old slot i) [BT, BS]."""
    o_s = tl.arange(0, BS)
    b_l = (i_n * C).to(tl.int32) + tl.arange(0, BC)
    b_t, b_d, _ = load_tokens(p_document_start, i_bh // H, i_n, o_t, T, C)
    b_start, b_death = load_slots(p_start, p_death, i_bh * (N + 1) + i_n, o_s, S)
    _, b_token, _, b_slot, _ = boundary_ranks(p_token_death, i_bh, i_n, b_start, b_death, b_t, b_d, T, C, BC)
    m_sees = (b_l[None, :] <= b_t[:, None]) & (b_l[None, :] >= b_d[:, None])
    p_d_sum += chunk_row(i_bh, i_n, T, H, S, C)
    o_row = o_t[:, None] * (H * S)
    b_inside = tl.load(p_d_sum + (o_row + tl.minimum(b_token, S - 1)), mask=m_sees, other=0.0)
    b_before = tl.load(p_d_sum + (o_row + tl.minimum(b_slot, S - 1)), mask=reads_slots(b_start, b_d), other=0.0)
    return b_inside, b_before


@triton.jit(do_not_specialize=["T", "H", "N", "GQ", "GK"])
def affinity_query_gradient_kernel(
    p_d_sum, p_kappa, p_sums, p_start, p_death, p_token_death, p_document_start, p_d_rho, T, H, N, GQ, GK,
    R: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
    BT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d rho of a block of a chunk's tokens, summed over up to GROUP of the heads that share it."""
    blocks: tl.constexpr = (C + BT - 1) // BT
    i_row, i_n, o_c = _chunk_program(N, R, BR)
    o_t = (i_row % blocks).to(tl.int32) * BT + tl.arange(0, BT)
    i_row = i_row // blocks
    parts = (GQ + GROUP - 1) // GROUP
    i_part = i_row % parts
    i_b = i_row // parts // (H // GQ)
    i_hq = i_row // parts % (H // GQ)
    o_s = tl.arange(0, BS)
    o_l = tl.arange(0, BC)
    b_l = (i_n * C).to(tl.int32) + o_l
    m_c = (o_c < R)[None, :]
    m_kappa = ((o_l < C) & (b_l < T))[:, None] & m_c
    b_d_rho = tl.zeros([BT, BR], tl.float32)
    for i in range(tl.minimum(GROUP, GQ - i_part * GROUP)):
        i_h = i_hq * GQ + i_part * GROUP + i
        i_bh = i_b * H + i_h
        b_inside, b_before = _d_products(
            p_d_sum, p_start, p_death, p_token_death, p_document_start, i_bh, i_n, o_t, T, H, N, S, C, BS, BC
        )
        p_k = p_kappa + ((i_b * T + i_n * C) * (H // GK) + i_h // GK) * R
        b_kappa = tl.load(p_k + (o_l[:, None] * (H // GK * R) + o_c[None, :]), mask=m_kappa, other=0.0)
        p_s = p_sums + (i_bh * (N + 1) + i_n) * S * R
        b_sums = tl.load(p_s + (o_s[:, None] * R + o_c[None, :]), mask=(o_s < S)[:, None] & m_c, other=0.0)
        b_d_rho = tl.dot(b_inside, b_kappa.to(tl.float32), b_d_rho, input_precision=PRECISION)
        b_d_rho = tl.dot(b_before, b_sums, b_d_rho, input_precision=PRECISION)
    p_d_rho += (((i_b * T + i_n * C) * (H // GQ) + i_hq) * parts + i_part) * R
    m_t = (o_t < C) & ((i_n * C).to(tl.int32) + o_t < T)
    tl.store(p_d_rho + (o_t[:, None] * (H // GQ * parts * R) + o_c[None, :]), b_d_rho, mask=m_t[:, None] & m_c)


@triton.jit(do_not_specialize=["T", "H", "N", "GQ"])
def affinity_sums_gradient_kernel(
    p_d_sum, p_rho, p_start, p_death, p_token_death, p_document_start, p_adjoint, T, H, N, GQ,
    R: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
    BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one chunk's reads add to the adjoint of the key sums it began with."""
    i_bh, i_n, o_c = _chunk_program(N, R, BR)
    o_s = tl.arange(0, BS)
    p_rho += ((i_bh // H * T + i_n * C) * (H // GQ) + i_bh % H // GQ) * R
    b_d_sums = tl.zeros([BS, BR], tl.float32)
    for i in range((C + BT - 1) // BT):
        o_t = i * BT + tl.arange(0, BT)
        _, b_before = _d_products(
            p_d_sum, p_start, p_death, p_token_death, p_document_start, i_bh, i_n, o_t, T, H, N, S, C, BS, BC
        )
        m_t = (o_t < C) & ((i_n * C).to(tl.int32) + o_t < T)
        o_x = o_t[:, None] * (H // GQ * R) + o_c[None, :]
        b_rho = tl.load(p_rho + o_x, mask=m_t[:, None] & (o_c < R)[None, :], other=0.0).to(tl.float32)
        b_d_sums = tl.dot(tl.trans(b_before), b_rho, b_d_sums, input_precision=PRECISION)
    p_adjoint += (i_bh * N + i_n) * S * R
    tl.store(p_adjoint + (o_s[:, None] * R + o_c[None, :]), b_d_sums, mask=(o_s < S)[:, None] & (o_c < R)[None, :])


@triton.jit(do_not_specialize=["N"])
def affinity_adjoints_kernel(
    p_start, p_adjoint, N, R: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Add to the adjoint of every chunk's key sums those of later chunks, last chunk first, in place."""
    blocks: tl.constexpr = (R + BR - 1) // BR
    i_bh = tl.program_id(0).to(tl.int64) // blocks
    o_s = tl.arange(0, BS)
    o_c = (tl.program_id(0) % blocks) * BR + tl.arange(0, BR)
    m_x = (o_s < S)[:, None] & (o_c < R)[None, :]
    o_x = o_s[:, None] * R + o_c[None, :]
    b_first, b_after = _load_span(p_start, i_bh * (N + 1) + N, o_s, S)
    b_adjoint = tl.zeros([BS, BR], tl.float32)
    for i in range(N):
        n = N - 1 - i
        b_start, b_start_after = _load_span(p_start, i_bh * (N + 1) + n, o_s, S)
        m_in = (b_first[None, :] <= b_start[:, None]) & (b_start[:, None] < b_after[None, :])
        p_x = p_adjoint + (i_bh * N + n) * S * R + o_x
        b_added = tl.load(p_x, mask=m_x, other=0.0)
        b_adjoint = b_added + tl.dot(m_in.to(tl.float32), b_adjoint, input_precision="tf32x3")
        tl.store(p_x, b_adjoint, mask=m_x)
        b_first = b_start
        b_after = b_start_after


@triton.jit(do_not_specialize=["T", "H", "N", "GQ", "GK"])
def affinity_key_gradient_kernel(
    p_d_sum, p_rho, p_adjoint, p_start, p_death, p_token_death, p_document_start, p_d_kappa, T, H, N, GQ, GK,
    R: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
    BT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d kappa of a chunk, from its own reads and from the sums it joined, summed over up to GROUP heads."""
    i_row, i_n, o_c = _chunk_program(N, R, BR)
    parts = (GK + GROUP - 1) // GROUP
    i_part = i_row % parts
    i_b = i_row // parts // (H // GK)
    i_hk = i_row // parts % (H // GK)
    o_s = tl.arange(0, BS)
    o_l = tl.arange(0, BC)
    b_l = (i_n * C).to(tl.int32) + o_l
    m_l = (o_l < C) & (b_l < T)
    m_c = (o_c < R)[None, :]
    b_d_kappa = tl.zeros([BC, BR], tl.float32)
    for i in range(tl.minimum(GROUP, GK - i_part * GROUP)):
        i_h = i_hk * GK + i_part * GROUP + i
        i_bh = i_b * H + i_h
        p_q = p_rho + ((i_b * T + i_n * C) * (H // GQ) + i_h // GQ) * R
        for i_t in range((C + BT - 1) // BT):
            o_t = i_t * BT + tl.arange(0, BT)
            b_inside, _ = _d_products(
                p_d_sum, p_start, p_death, p_token_death, p_document_start, i_bh, i_n, o_t, T, H, N, S, C, BS, BC
            )
            m_t = (o_t < C) & ((i_n * C).to(tl.int32) + o_t < T)
            o_x = o_t[:, None] * (H // GQ * R) + o_c[None, :]
            b_rho = tl.load(p_q + o_x, mask=m_t[:, None] & m_c, other=0.0).to(tl.float32)
            b_d_kappa = tl.dot(tl.trans(b_inside), b_rho, b_d_kappa, input_precision=PRECISION)
        if i_n + 1 < N:
            b_first = tl.load(p_start + (i_bh * (N + 1) + i_n + 1) * S + o_s, mask=o_s < S, other=FAR)
            b_joined = tl.sum((b_first[None, :] <= b_l[:, None]).to(tl.int32), 1) - 1
            o_x = (i_bh * N + i_n + 1) * S * R + (b_joined[:, None] * R + o_c[None, :])
            b_d_kappa += tl.load(p_adjoint + o_x, mask=(m_l & (b_joined >= 0))[:, None] & m_c, other=0.0)
    p_d_kappa += (((i_b * T + i_n * C) * (H // GK) + i_hk) * parts + i_part) * R
    tl.store(p_d_kappa + (o_l[:, None] * (H // GK * parts * R) + o_c[None, :]), b_d_kappa, mask=m_l[:, None] & m_c)


@dataclass(frozen=True)
class _Sizes:
    """What the launches of one call share."""

    table: SlotTable
    batch: int
    heads: int
    rho_group: int
    """Heads that share a routing query."""
    kappa_group: int
    """Heads that share a routing key."""
    dim: int
    precision: str

    @classmethod
    def of(cls, rho: Tensor, kappa: Tensor, table: SlotTable) -> _Sizes:
        batch, heads = table.fill.shape[:2]
        groups = heads // rho.shape[2], heads // kappa.shape[2]
        return cls(table, batch, heads, *groups, rho.shape[3], dot_precision(rho.dtype))

    @property
    def counts(self) -> tuple[int, int, int]:
        """(T, H, N)."""
        return self.table.tokens, self.heads, self.table.chunks

    @property
    def plan(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.table.start, self.table.death, self.table.token_death, self.table.document_start

    @property
    def programs(self) -> int:
        """Chunks of all heads."""
        return self.batch * self.heads * self.table.chunks

    def edges(self, rows: int) -> Tensor:
        """[B, H, rows, S, R] float32, unwritten."""
        shape = (self.batch, self.heads, rows, self.table.capacity, self.dim)
        return torch.empty(shape, dtype=torch.float32, device=self.table.start.device)

    def constants(self, kernel: str, *names: str) -> dict[str, Any]:
        """Settings of a kernel with the constants it takes, the ones called `names` among them."""
        settings: dict[str, Any] = dict(tuning(kernel, self.table.start.device))
        width = power_of_2(self.table.chunk, 16)
        known = {
            "R": self.dim,
            "S": self.table.capacity,
            "C": self.table.chunk,
            "BS": power_of_2(self.table.capacity, 16),
            "BC": width,
            "PRECISION": self.precision,
        }
        for name, most in (("BR", power_of_2(self.dim, 16)), ("BT", width)):
            if name in settings:
                settings[name] = min(settings[name], most)
        return settings | {name: known[name] for name in names}

    def columns(self, constants: dict[str, Any]) -> int:
        """Blocks of columns."""
        return cdiv(self.dim, constants["BR"])

    def token_blocks(self, constants: dict[str, Any]) -> int:
        return cdiv(self.table.chunk, constants["BT"])


def _edge_sums(kappa: Tensor, key_sums: Tensor | None, sizes: _Sizes) -> Tensor:
    """Key sums at every edge: [B, H, N+1, S, R] float32."""
    sums = sizes.edges(sizes.table.chunks + 1)
    settings = sizes.constants("key_sums_added", "R", "S", "C", "BS", "BC", "PRECISION")
    launch(
        key_sums_added_kernel, (sizes.programs * sizes.columns(settings),), kappa, sizes.table.start, sums,
        *sizes.counts, sizes.kappa_group, **settings,
    )  # fmt: skip
    settings = sizes.constants("key_sums_carried", "R", "S", "BS")
    launch(
        key_sums_carried_kernel, (sizes.batch * sizes.heads * sizes.columns(settings),), key_sums, sizes.table.start,
        sums, sizes.table.chunks, **settings,
    )  # fmt: skip
    return sums


class _Affinity(torch.autograd.Function):
    """Keeps its inputs alone; key sums are made again in backward."""

    @staticmethod
    def forward(ctx: Any, rho: Tensor, kappa: Tensor, key_sums: Tensor | None, table: SlotTable) -> Tensor:
        sizes = _Sizes.of(rho, kappa, table)
        tokens, heads, _ = sizes.counts
        sums = _edge_sums(kappa, key_sums, sizes)
        out = torch.empty(sizes.batch, tokens, heads, table.capacity, dtype=torch.float32, device=rho.device)
        settings = sizes.constants("affinity_read", "R", "S", "C", "BS", "BC", "PRECISION")
        launch(
            affinity_read_kernel, (sizes.programs * sizes.token_blocks(settings),), rho, kappa, sums, *sizes.plan, out,
            *sizes.counts, sizes.rho_group, sizes.kappa_group, **settings,
        )  # fmt: skip
        ctx.save_for_backward(rho, kappa, key_sums)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rho, kappa, key_sums = ctx.saved_tensors
        sizes: _Sizes = ctx.sizes
        d_sum = torch.empty_like(grads[0], dtype=torch.float32, memory_format=torch.contiguous_format)
        settings = sizes.constants("affinity_scale", "S", "C", "BS", "BC")
        launch(
            affinity_scale_kernel, (sizes.programs * sizes.token_blocks(settings),), grads[0].contiguous(), *sizes.plan,
            d_sum, *sizes.counts, **settings,
        )  # fmt: skip
        d_rho = _d_rho(d_sum, rho, kappa, _edge_sums(kappa, key_sums, sizes), sizes)
        adjoint = _adjoints(d_sum, rho, sizes)
        d_kappa = _d_kappa(d_sum, rho, kappa, adjoint, sizes)
        d_key_sums = None if key_sums is None else adjoint[:, :, 0].to(key_sums.dtype)
        return d_rho, d_kappa, d_key_sums, None


def _d_rho(d_sum: Tensor, rho: Tensor, kappa: Tensor, sums: Tensor, sizes: _Sizes) -> Tensor:
    settings = sizes.constants("affinity_query_gradient", "R", "S", "C", "BS", "BC", "PRECISION")
    out = _parts(rho, sizes.rho_group, settings["GROUP"])
    chunks = out.shape[0] * out.shape[2] * out.shape[3] * sizes.table.chunks
    launch(
        affinity_query_gradient_kernel, (chunks * sizes.token_blocks(settings) * sizes.columns(settings),), d_sum,
        kappa, sums, *sizes.plan, out, *sizes.counts, sizes.rho_group, sizes.kappa_group, **settings,
    )  # fmt: skip
    return out.sum(3).to(rho.dtype)


def _adjoints(d_sum: Tensor, rho: Tensor, sizes: _Sizes) -> Tensor:
    """Adjoints of the key sums every chunk begins with: [B, H, N, S, R] float32."""
    adjoint = sizes.edges(sizes.table.chunks)
    settings = sizes.constants("affinity_sums_gradient", "R", "S", "C", "BS", "BC", "PRECISION")
    launch(
        affinity_sums_gradient_kernel, (sizes.programs * sizes.columns(settings),), d_sum, rho, *sizes.plan, adjoint,
        *sizes.counts, sizes.rho_group, **settings,
    )  # fmt: skip
    settings = sizes.constants("affinity_adjoints", "R", "S", "BS")
    launch(
        affinity_adjoints_kernel, (sizes.batch * sizes.heads * sizes.columns(settings),), sizes.table.start, adjoint,
        sizes.table.chunks, **settings,
    )  # fmt: skip
    return adjoint


def _d_kappa(d_sum: Tensor, rho: Tensor, kappa: Tensor, adjoint: Tensor, sizes: _Sizes) -> Tensor:
    settings = sizes.constants("affinity_key_gradient", "R", "S", "C", "BS", "BC", "PRECISION")
    out = _parts(kappa, sizes.kappa_group, settings["GROUP"])
    chunks = out.shape[0] * out.shape[2] * out.shape[3] * sizes.table.chunks
    launch(
        affinity_key_gradient_kernel, (chunks * sizes.columns(settings),), d_sum, rho, adjoint, *sizes.plan, out,
        *sizes.counts, sizes.rho_group, sizes.kappa_group, **settings,
    )  # fmt: skip
    return out.sum(3).to(kappa.dtype)


def _parts(x: Tensor, group: int, together: int) -> Tensor:
    """[B, T, heads of x, parts, R] float32: a gradient in parts of up to `together` of the heads that share x."""
    return torch.empty(*x.shape[:3], cdiv(group, together), x.shape[3], dtype=torch.float32, device=x.device)


@eager
def chunk_affinity_triton(rho: Tensor, kappa: Tensor, table: SlotTable, key_sums: Tensor | None = None) -> Tensor:
    """[B, T, H, S] float32 by recency rank, -inf where no slot.

    rho, kappa [B, T, Hk or H, R]; key_sums [B, H, S, R] of the cache that carries the slots of the table's first edge.
    Differentiable in all three.
    """
    dtype = torch.promote_types(rho.dtype, kappa.dtype)
    tensors = [rho.to(dtype).contiguous(), kappa.to(dtype).contiguous()]
    affinity: Tensor = _Affinity.apply(*tensors, None if key_sums is None else key_sums.contiguous(), table)
    return affinity


def final_key_sums(kappa: Tensor, table: SlotTable, key_sums: Tensor | None = None, block_tokens: int = 4096) -> Tensor:
    """Key sums of the slots at the row's end: [B, H, S, R] float32; kappa [B, T, Hk or H, R], key_sums as carried.

    Products with ones and zeros, block_tokens at a time: no pass over chunks, since a slot is a range of tokens.
    Differentiable in both.
    """
    start = table.start[:, :, -1]
    after = torch.cat([start[..., 1:], torch.full_like(start[..., :1], FAR.value)], dim=-1)

    def holds(token: Tensor) -> Tensor:
        return ((start[..., None] <= token) & (token < after[..., None])).float()

    groups = kappa.shape[2]
    sums = torch.zeros(*start.shape, kappa.shape[3], dtype=torch.float32, device=kappa.device)
    for begin in range(0, table.tokens, block_tokens):
        keys = kappa[:, begin : begin + block_tokens].transpose(1, 2).float()
        index = torch.arange(begin, begin + keys.shape[2], device=kappa.device, dtype=torch.int32)
        held = holds(index).unflatten(1, (groups, -1)).flatten(2, 3)
        sums = sums + (held @ keys).view(sums.shape)
    if key_sums is not None:
        first = table.start[:, :, 0]
        carried = torch.where((first < FAR.value)[..., None], key_sums.float(), 0.0)
        sums = sums + holds(first[:, :, None]) @ carried
    return sums
