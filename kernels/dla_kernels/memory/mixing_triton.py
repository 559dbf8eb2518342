"""Chunkwise multi-state mixing in Triton: one differentiable operation for both backbones and every policy.

    o = (M * W) V + sum_i w0_i (Q~ S_i)            (docs/dla.md section 5)

The states at chunk edges come from the sweeps of sweep_triton.py, a group of chunks at a time; what reads them, forward
and backward, is parallel over chunks. Memory for S states of K x V float32 and N chunks in groups of G: forward and
backward hold a buffer of G + 1 edges, backward a second one for the adjoints, and N / G - 1 edges are kept from one to
the other, so B H S K V 4 (2 (G + 1) + N / G) bytes at most (`group_size`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dla_kernels.backbones.operators import ChunkOperators, Transition
from dla_kernels.launch import cdiv, dot_precision, launch, power_of_2, tuning
from dla_kernels.memory.gates_triton import add_slot_weight_gradients, slot_weights_by_slot
from dla_kernels.memory.sweep_triton import FAR, Group, fit, load_tile, slot_versions, store_tile
from dla_kernels.memory.table import SlotTable

GROUP_BYTES = 512 * 2**20
"""A buffer of edges this small is not divided further."""


@triton.jit
def token_ranks(token_death, document_start, row, c0, tokens, C: tl.constexpr, S: tl.constexpr):
    """(rank [rows, C] at token t = c0 + row of the slot that holds the chunk's token l, whether t sees l)."""
    reader = c0 + row
    token = c0 + tl.arange(0, C)
    death = tl.load(token_death + token, mask=token < tokens, other=-1)
    document = tl.load(document_start + reader, mask=reader < tokens, other=0)
    sees = (token[None, :] <= reader[:, None]) & (token[None, :] >= document[:, None]) & (reader < tokens)[:, None]
    alive = (sees & (death[None, :] > reader[:, None])).to(tl.int32)
    rank = tl.sum(alive, 1)[:, None] - tl.cumsum(alive, 1)
    return tl.minimum(rank, S - 1), sees


@triton.jit(do_not_specialize=["first", "count", "chunks", "tokens", "heads", "rows"])
def mix_read_kernel(
    out, mixing, query, query_open, values, weights, slot_weights, states, version, factor,
    token_death, document_start, fill, first, count, chunks, tokens, heads, rows,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, BK: tl.constexpr, N_K: tl.constexpr,
    BV: tl.constexpr, FROZEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk and a block of value columns."""
    pid = tl.program_id(0).to(tl.int64)
    i_v = pid % tl.cdiv(V, BV)
    pid = pid // tl.cdiv(V, BV)
    c = pid % count
    bh = pid // count
    n = first + c
    b = bh // heads
    c0 = (n * C).to(tl.int32)
    at = tl.arange(0, C)
    column_v = i_v * BV + tl.arange(0, BV)
    left = tokens - c0
    o_row = (b * tokens + n * C) * heads + bh % heads

    rank, sees = token_ranks(token_death + bh * tokens, document_start + b * tokens, at, c0, tokens, C, S)
    b_weight = tl.load(weights + o_row * S + (at[:, None] * (heads * S) + rank), mask=sees, other=0.0)
    b_mixing = load_tile(mixing + (bh * chunks + n) * C * C, at, at, C, C, C)
    b_value = load_tile(values + o_row * V, at, column_v, heads * V, left, V)
    within = (b_mixing.to(tl.float32) * b_weight).to(b_mixing.dtype)
    acc = tl.dot(within, b_value.to(within.dtype), input_precision=PRECISION)

    o_chunk = (bh * chunks + n) * C * K
    queries = ()
    for t in tl.static_range(N_K):
        queries = queries + (load_tile(query + o_chunk, at, t * BK + tl.arange(0, BK), K, C, K),)
    p_state = states + bh * rows * S * K * V
    p_slot = slot_weights + (bh * chunks + n) * S * C + at
    edge = (bh * (chunks + 1) + n) * S
    live = tl.load(fill + bh * (chunks + 1) + n)
    stop = live
    if FROZEN:
        stop = live - 1
    for i in range(stop):
        weight = tl.load(p_slot + i * C)
        o_state = tl.cast(c * S + i, tl.int64)
        if version is not None:
            o_state = tl.load(version + edge + i).to(tl.int64)
            weight *= tl.load(factor + edge + i)
        read = tl.zeros([C, BV], tl.float32)
        for t in tl.static_range(N_K):
            tile = load_tile(p_state + o_state * K * V, t * BK + tl.arange(0, BK), column_v, V, K, V)
            read = tl.dot(queries[t], tile.to(queries[t].dtype), read, input_precision=PRECISION)
        acc += weight[:, None] * read
    if FROZEN:
        if live > 0:
            weight = tl.load(p_slot + (live - 1) * C)
            o_state = tl.load(version + edge + live - 1).to(tl.int64)
            read = tl.zeros([C, BV], tl.float32)
            for t in tl.static_range(N_K):
                column = t * BK + tl.arange(0, BK)
                b_query = load_tile(query_open + o_chunk, at, column, K, C, K)
                tile = load_tile(p_state + o_state * K * V, column, column_v, V, K, V)
                read = tl.dot(b_query, tile.to(b_query.dtype), read, input_precision=PRECISION)
            acc += weight[:, None] * read
    store_tile(out + o_row * V, at, column_v, heads * V, left, V, acc)


@triton.jit
def slot_gradient(
    query, p_state, p_adjoint, p_out, at, column_k, row_stride, left,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ADJOINT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dO S^T [C, BK] of one slot, its product with the query by token [C], and <adjoint, state>."""
    acc = tl.zeros([C, BK], tl.float32)
    inner = 0.0
    for i_v in range(tl.cdiv(V, BV)):
        column_v = i_v * BV + tl.arange(0, BV)
        b_out = load_tile(p_out, at, column_v, row_stride, left, V).to(query.dtype)
        tile = load_tile(p_state, column_k, column_v, V, K, V)
        acc = tl.dot(b_out, tl.trans(tile.to(query.dtype)), acc, input_precision=PRECISION)
        if ADJOINT:
            inner += tl.sum(tile * load_tile(p_adjoint, column_k, column_v, V, K, V))
    return acc, tl.sum(query.to(tl.float32) * acc, 1), inner


@triton.jit(do_not_specialize=["first", "count", "chunks", "tokens", "heads", "rows", "programs"])
def mix_read_backward_kernel(
    d_query, d_query_open, d_slot_weights, d_decay, d_out, query, query_open, slot_weights, states, adjoints,
    version, factor, start, fill, first, count, chunks, tokens, heads, rows, programs,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, FROZEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adjoints of what a chunk reads old slots with, for a block of key columns.

    d_slot_weights [blocks, B, H, N, S, C] and d_decay [blocks, B, H, N] are summed over the blocks afterwards.
    """
    pid = tl.program_id(0).to(tl.int64)
    i_k = pid % tl.cdiv(K, BK)
    pid = pid // tl.cdiv(K, BK)
    c = pid % count
    bh = pid // count
    n = first + c
    c0 = (n * C).to(tl.int32)
    at = tl.arange(0, C)
    column_k = i_k * BK + tl.arange(0, BK)
    slot = tl.arange(0, SP)
    left = tokens - c0
    p_out = d_out + (((bh // heads) * tokens + n * C) * heads + bh % heads) * V
    o_chunk = (bh * chunks + n) * C * K
    edge = (bh * (chunks + 1) + n) * S
    live = tl.load(fill + bh * (chunks + 1) + n)
    news = tl.load(start + edge + S + slot, mask=slot < S, other=FAR)
    p_state = states + bh * rows * S * K * V
    p_adjoint = adjoints + (bh * rows + c + 1) * S * K * V
    p_weight = slot_weights + (bh * chunks + n) * S * C + at
    p_d_weight = d_slot_weights + ((i_k * programs + bh) * chunks + n) * S * C + at
    b_query = load_tile(query + o_chunk, at, column_k, K, C, K)
    acc = tl.zeros([C, BK], tl.float32)
    decay_sum = 0.0
    stop = live
    if FROZEN:
        stop = live - 1
    for i in range(stop):
        weight = tl.load(p_weight + i * C)
        o_state = tl.cast(c * S + i, tl.int64)
        b_factor = 1.0
        if version is not None:
            o_state = tl.load(version + edge + i).to(tl.int64)
            b_factor = tl.load(factor + edge + i)
        into = tl.sum((news <= tl.load(start + edge + i)).to(tl.int32), 0) - 1
        grad, by_token, inner = slot_gradient(
            b_query, p_state + o_state * K * V, p_adjoint + tl.maximum(into, 0).to(tl.int64) * K * V, p_out,
            at, column_k, heads * V, left, C, K, V, BK, BV, not FROZEN, PRECISION,
        )  # fmt: skip
        acc += (weight * b_factor)[:, None] * grad
        tl.store(p_d_weight + i * C, by_token * b_factor)
        decay_sum += tl.where(into >= 0, inner * b_factor, 0.0)
    store_tile(d_query + o_chunk, at, column_k, K, C, K, acc)
    if FROZEN:
        acc = tl.zeros([C, BK], tl.float32)
        if live > 0:
            weight = tl.load(p_weight + (live - 1) * C)
            o_state = tl.load(version + edge + live - 1).to(tl.int64)
            into = tl.sum((news <= tl.load(start + edge + live - 1)).to(tl.int32), 0) - 1
            b_open = load_tile(query_open + o_chunk, at, column_k, K, C, K)
            grad, by_token, inner = slot_gradient(
                b_open, p_state + o_state * K * V, p_adjoint + tl.maximum(into, 0).to(tl.int64) * K * V, p_out,
                at, column_k, heads * V, left, C, K, V, BK, BV, True, PRECISION,
            )  # fmt: skip
            acc = weight[:, None] * grad
            tl.store(p_d_weight + (live - 1) * C, by_token)
            decay_sum += tl.where(into >= 0, inner, 0.0)
        store_tile(d_query_open + o_chunk, at, column_k, K, C, K, acc)
    tl.store(d_decay + (i_k * programs + bh) * chunks + n, decay_sum)


@triton.jit(do_not_specialize=["first", "count", "chunks", "rows"])
def mix_erase_backward_kernel(
    grad, other, states, adjoints, version, start, fill, first, count, chunks, rows,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BK: tl.constexpr,
    N_K: tl.constexpr, BV: tl.constexpr, FROZEN: tl.constexpr, OF_ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d erase = -sum_i (restore D_j) S_i^T or d restore = -sum_i (erase S_i) D_j^T of a chunk; `other`: the second."""
    pid = tl.program_id(0).to(tl.int64)
    c = pid % count
    bh = pid // count
    n = first + c
    at = tl.arange(0, C)
    slot = tl.arange(0, SP)
    o_chunk = (bh * chunks + n) * C * K
    edge = (bh * (chunks + 1) + n) * S
    live = tl.load(fill + bh * (chunks + 1) + n)
    news = tl.load(start + edge + S + slot, mask=slot < S, other=FAR)
    others = ()
    grads = ()
    for t in tl.static_range(N_K):
        others = others + (load_tile(other + o_chunk, at, t * BK + tl.arange(0, BK), K, C, K),)
        grads = grads + (tl.zeros([C, BK], tl.float32),)
    begin = 0
    if FROZEN:
        begin = tl.maximum(live - 1, 0)
    for i in range(begin, live):
        into = tl.sum((news <= tl.load(start + edge + i)).to(tl.int32), 0) - 1
        height = tl.where(into >= 0, K, 0)
        o_state = tl.cast(c * S + i, tl.int64)
        if version is not None:
            o_state = tl.load(version + edge + i).to(tl.int64)
        p_state = states + (bh * rows * S + o_state) * K * V
        p_adjoint = adjoints + ((bh * rows + c + 1) * S + into) * K * V
        if OF_ERASE:
            p_inner = p_adjoint
            p_outer = p_state
        else:
            p_inner = p_state
            p_outer = p_adjoint
        for i_v in range(tl.cdiv(V, BV)):
            column_v = i_v * BV + tl.arange(0, BV)
            inner = tl.zeros([C, BV], tl.float32)
            for t in tl.static_range(N_K):
                tile = load_tile(p_inner, t * BK + tl.arange(0, BK), column_v, V, height, V)
                inner = tl.dot(others[t], tile.to(others[t].dtype), inner, input_precision=PRECISION)
            narrow = inner.to(others[0].dtype)
            more = ()
            for t in tl.static_range(N_K):
                tile = load_tile(p_outer, t * BK + tl.arange(0, BK), column_v, V, height, V).to(narrow.dtype)
                more = more + (tl.dot(narrow, tl.trans(tile), grads[t], input_precision=PRECISION),)
            grads = more
    for t in tl.static_range(N_K):
        store_tile(grad + o_chunk, at, t * BK + tl.arange(0, BK), K, C, K, -grads[t])


@triton.jit
def add_in_segment(sum_a, begins_a, sum_b, begins_b):
    """Running sum that begins anew where `begins` is set."""
    return tl.where(begins_b > 0, sum_b, sum_a + sum_b), begins_a | begins_b


@triton.jit(do_not_specialize=["chunks", "tokens", "heads"])
def mix_within_backward_kernel(
    d_mixing, d_weights, d_out, mixing, values, weights, token_death, document_start, chunks, tokens, heads,
    C: tl.constexpr, V: tl.constexpr, S: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adjoints of M and W in (M * W) V, for BT rows of a chunk; d_weights holds 0 and gets the ranks that occur.

    Tokens of one rank lie side by side, so that a rank's sum stands at its last token after a segmented scan.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = C // BT
    row = (pid % blocks).to(tl.int32) * BT + tl.arange(0, BT)
    pid = pid // blocks
    n = pid % chunks
    bh = pid // chunks
    b = bh // heads
    c0 = (n * C).to(tl.int32)
    left = tokens - c0
    at = tl.arange(0, C)
    o_row = (b * tokens + n * C) * heads + bh % heads
    o_mixing = (bh * chunks + n) * C * C
    grad = tl.zeros([BT, C], tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        column_v = i_v * BV + tl.arange(0, BV)
        b_out = load_tile(d_out + o_row * V, row, column_v, heads * V, left, V).to(mixing.dtype.element_ty)
        b_value = load_tile(values + o_row * V, at, column_v, heads * V, left, V).to(b_out.dtype)
        grad = tl.dot(b_out, tl.trans(b_value), grad, input_precision=PRECISION)
    rank, sees = token_ranks(token_death + bh * tokens, document_start + b * tokens, row, c0, tokens, C, S)
    o_weight = o_row * S + (row[:, None] * (heads * S) + rank)
    b_weight = tl.load(weights + o_weight, mask=sees, other=0.0)
    store_tile(d_mixing + o_mixing, row, at, C, C, C, grad * b_weight)
    by_token = grad * load_tile(mixing + o_mixing, row, at, C, C, C).to(tl.float32)
    by_token = tl.where(sees, by_token, 0.0)
    p_death = token_death + bh * tokens + c0 + at
    death = tl.load(p_death, mask=at < left, other=-1)
    begins = (death[None, :] > c0 + row[:, None]).to(tl.int32)
    total, _ = tl.associative_scan((by_token, begins), 1, add_in_segment)
    death = tl.load(p_death + 1, mask=at + 1 < left, other=-1)
    ends = (at[None, :] == row[:, None]) | (death[None, :] > c0 + row[:, None])
    tl.store(d_weights + o_weight, total, mask=sees & ends)


@triton.jit(do_not_specialize=["chunks", "tokens", "heads"])
def mix_values_backward_kernel(
    d_values, d_out, mixing, weights, token_death, document_start, chunks, tokens, heads,
    C: tl.constexpr, V: tl.constexpr, S: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_values = (M * W)^T dO of one chunk and a block of value columns."""
    pid = tl.program_id(0).to(tl.int64)
    column_v = (pid % tl.cdiv(V, BV)) * BV + tl.arange(0, BV)
    pid = pid // tl.cdiv(V, BV)
    n = pid % chunks
    bh = pid // chunks
    b = bh // heads
    c0 = (n * C).to(tl.int32)
    left = tokens - c0
    at = tl.arange(0, C)
    o_row = (b * tokens + n * C) * heads + bh % heads
    rank, sees = token_ranks(token_death + bh * tokens, document_start + b * tokens, at, c0, tokens, C, S)
    b_weight = tl.load(weights + o_row * S + (at[:, None] * (heads * S) + rank), mask=sees, other=0.0)
    b_mixing = load_tile(mixing + (bh * chunks + n) * C * C, at, at, C, C, C)
    within = (b_mixing.to(tl.float32) * b_weight).to(b_mixing.dtype)
    b_out = load_tile(d_out + o_row * V, at, column_v, heads * V, left, V).to(within.dtype)
    b_d_value = tl.dot(tl.trans(within), b_out, input_precision=PRECISION)
    store_tile(d_values + o_row * V, at, column_v, heads * V, left, V, b_d_value)


@triton.jit(do_not_specialize=["first", "count", "chunks", "tokens", "heads", "rows"])
def mix_write_backward_kernel(
    d_key_end, d_values, key_end, values, adjoints, start, fill, first, count, chunks, tokens, heads, rows,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, N_K: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adjoints of what BT tokens write into slots: dK~_l = V_l D_j^T, dV_l += K~_l D_j, j the slot l ends up in."""
    pid = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = C // BT
    i_t = pid % blocks
    pid = pid // blocks
    c = pid % count
    bh = pid // count
    n = first + c
    c0 = (n * C).to(tl.int32)
    token = c0 + i_t.to(tl.int32) * BT + tl.arange(0, BT)
    slot = tl.arange(0, SP)
    left = tokens - c0
    o_row = (((bh // heads) * tokens + n * C) * heads + bh % heads) * V
    p_key = key_end + (bh * chunks + n) * C * K
    edge = (bh * (chunks + 1) + n + 1) * S
    live = tl.load(fill + bh * (chunks + 1) + n + 1)
    starts = tl.load(start + edge + slot, mask=slot < S, other=FAR)
    r0 = c0 + i_t.to(tl.int32) * BT
    oldest = tl.maximum(tl.sum((starts <= r0).to(tl.int32), 0) - 1, 0)
    newest = tl.sum((starts < r0 + BT).to(tl.int32), 0)
    d_keys = ()
    for t in tl.static_range(N_K):
        d_keys = d_keys + (tl.zeros([BT, BK], tl.float32),)
    for i_v in range(tl.cdiv(V, BV)):
        column_v = i_v * BV + tl.arange(0, BV)
        b_value = load_tile(values + o_row, token - c0, column_v, heads * V, left, V)
        b_d_value = load_tile(d_values + o_row, token - c0, column_v, heads * V, left, V)
        for j in range(oldest, newest):
            begin = tl.load(start + edge + j)
            end = tl.load(start + edge + j + 1, mask=j + 1 < live, other=FAR)
            mine = (token >= begin) & (token < end)
            p_adjoint = adjoints + ((bh * rows + c + 1) * S + j) * K * V
            more = ()
            for t in tl.static_range(N_K):
                column = t * BK + tl.arange(0, BK)
                tile = load_tile(p_adjoint, column, column_v, V, K, V)
                b_key = load_tile(p_key, token - c0, column, K, C, K)
                tile = tile.to(b_key.dtype)
                mine_value = tl.where(mine[:, None], b_value, 0.0).to(b_key.dtype)
                more = more + (tl.dot(mine_value, tl.trans(tile), d_keys[t], input_precision=PRECISION),)
                mine_key = tl.where(mine[:, None], b_key, 0.0).to(b_key.dtype)
                b_d_value = tl.dot(mine_key, tile, b_d_value, input_precision=PRECISION)
            d_keys = more
        store_tile(d_values + o_row, token - c0, column_v, heads * V, left, V, b_d_value)
    for t in tl.static_range(N_K):
        column = t * BK + tl.arange(0, BK)
        store_tile(d_key_end + (bh * chunks + n) * C * K, token - c0, column, K, C, K, d_keys[t])


def group_size(chunks: int, edge_bytes: int) -> int:
    """Chunks swept together: as many as GROUP_BYTES hold, at least sqrt(N), which makes the least memory in all."""
    return min(chunks, max(GROUP_BYTES // max(edge_bytes, 1), math.isqrt(chunks - 1) + 1))


@dataclass(frozen=True)
class _Sizes:
    """What every kernel of one call is launched with."""

    table: SlotTable
    frozen: bool
    group: int

    def groups(self) -> list[tuple[int, int]]:
        """(first chunk, count) of every group."""
        return [(n, min(self.group, self.table.chunks - n)) for n in range(0, self.table.chunks, self.group)]


def mix_triton(
    initial: Tensor | None,
    operators: ChunkOperators,
    values: Tensor,
    weights: Tensor,
    table: SlotTable,
    *,
    key_dim: int,
    group: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(outputs [B,T,H,V] in values' dtype, final states [B,H,S,K,V] float32).

    initial [B,H,S,K,V] float32 or None (empty); operators of `chunk_operators_triton`; values [B,T,H,V]; weights
    [B,T,H,S] float32 by recency rank, gates applied. Differentiable once in all of them.
    """
    batch, _, heads, value_dim = values.shape
    if initial is None:
        initial = values.new_zeros(batch, heads, table.capacity, key_dim, value_dim, dtype=torch.float32)
    edge_bytes = initial.numel() * 4
    sizes = _Sizes(table, operators.transition_closed is None, group or group_size(table.chunks, edge_bytes))
    opened = operators.transition_open
    out, states = _Mix.apply(
        sizes, initial.float().contiguous(), operators.mixing, operators.query_closed,
        operators.query_open if sizes.frozen else None, operators.key_end, opened.decay, opened.erase, opened.restore,
        values.contiguous(), weights.float().contiguous(),
    )  # fmt: skip
    return out, states


class _Mix(torch.autograd.Function):
    """Inputs as in `mix_triton`; query_open is given where closed slots are frozen."""

    @staticmethod
    def forward(
        ctx: Any, sizes: _Sizes, initial: Tensor, mixing: Tensor, query: Tensor, query_open: Tensor | None,
        key_end: Tensor, decay: Tensor, erase: Tensor | None, restore: Tensor | None, values: Tensor, weights: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        table, transition = sizes.table, Transition(decay, erase, restore)
        versions = _versions(sizes, transition)
        by_slot = slot_weights_by_slot(weights, table)
        out = torch.empty_like(values)
        states = _edges(initial, sizes)
        states[:, :, 0] = initial
        kept = []
        for first, count in sizes.groups():
            if first and any(ctx.needs_input_grad):
                kept.append(states[:, :, 0].clone())
            group = Group(table, transition, versions, first, count, frozen=sizes.frozen)
            group.sweep_states(states, key_end, values)
            _read(out, group, mixing, query, query_open, values, weights, by_slot, states)
            states[:, :, 0] = states[:, :, count]
        ctx.sizes = sizes
        ctx.save_for_backward(
            initial, mixing, query, query_open, key_end, decay, erase, restore, values, weights, *kept
        )
        return out, _used(states[:, :, 0], table, edge=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sizes: _Sizes = ctx.sizes
        initial, mixing, query, query_open, key_end, decay, erase, restore, values, weights, *kept = ctx.saved_tensors
        table, transition = sizes.table, Transition(decay, erase, restore)
        d_out, d_final = grads[0].contiguous(), grads[1]
        versions = _versions(sizes, transition)
        by_slot = slot_weights_by_slot(weights, table)
        d_mixing, d_weights, d_values = _within_backward(d_out, mixing, values, weights, table)
        grad = _Gradients.empty(query, query_open, key_end, decay, erase, by_slot)
        states, adjoints = _edges(initial, sizes), _edges(initial, sizes)
        adjoints[:, :, 0] = d_final
        for number, (first, count) in reversed(list(enumerate(sizes.groups()))):
            group = Group(table, transition, versions, first, count, frozen=sizes.frozen)
            states[:, :, 0] = kept[number - 1] if number else initial
            group.sweep_states(states, key_end, values)
            adjoints[:, :, count] = adjoints[:, :, 0]
            group.sweep_adjoints(adjoints, d_out, query, query_open, by_slot)
            grad.of_reads(group, d_out, query, query_open, by_slot, states, adjoints)
            grad.of_writes(group, d_values, key_end, values, adjoints)
            if erase is not None:
                grad.of_erasing(group, states, adjoints)
        add_slot_weight_gradients(grad.slot_weights.sum(0), d_weights, table)
        d_initial = _used(adjoints[:, :, 0], table, edge=0)
        return (
            None, d_initial, d_mixing, grad.query, grad.query_open, grad.key_end, grad.decay.sum(0), grad.erase,
            grad.restore, d_values.to(values.dtype), d_weights,
        )  # fmt: skip


def _versions(sizes: _Sizes, transition: Transition) -> tuple[Tensor, Tensor] | None:
    """Where erasing changes every slot in every chunk there is nothing to look up."""
    if transition.erase is not None and not sizes.frozen:
        return None
    return slot_versions(sizes.table, transition.decay, sizes.group, frozen=sizes.frozen)


def _edges(initial: Tensor, sizes: _Sizes) -> Tensor:
    """Buffer [B, H, G+1, S, K, V] of states at chunk edges."""
    batch, heads, *rest = initial.shape
    return torch.empty(batch, heads, sizes.group + 1, *rest, dtype=initial.dtype, device=initial.device)


def _used(states: Tensor, table: SlotTable, edge: int) -> Tensor:
    """A copy of states [B, H, S, K, V] at an edge, zero in unused slots, which no kernel writes."""
    unused = torch.arange(table.capacity, device=states.device) >= table.fill[:, :, edge, None]
    return states.masked_fill(unused[..., None, None], 0.0)


def _read(
    out: Tensor, group: Group, mixing: Tensor, query: Tensor, query_open: Tensor | None, values: Tensor,
    weights: Tensor, by_slot: Tensor, states: Tensor,
) -> None:  # fmt: skip
    table = group.table
    batch, heads, rows, slots, key_dim, value_dim = states.shape
    settings = fit(tuning("mix_read", out.device), key_dim, value_dim)
    launch(
        mix_read_kernel, (batch * heads * group.count * cdiv(value_dim, settings["BV"]),),
        out, mixing, query, query_open, values, weights, by_slot, states, group.version, group.factor,
        table.token_death, table.document_start, table.fill,
        group.first, group.count, table.chunks, table.tokens, heads, rows,
        C=table.chunk, K=key_dim, V=value_dim, S=slots, N_K=cdiv(key_dim, settings["BK"]), FROZEN=group.frozen,
        PRECISION=dot_precision(query.dtype), **settings,
    )  # fmt: skip


def _within_backward(
    d_out: Tensor, mixing: Tensor, values: Tensor, weights: Tensor, table: SlotTable
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, value_dim = values.shape
    d_mixing, d_weights = torch.empty_like(mixing), torch.zeros_like(weights)
    d_values = torch.empty_like(values, dtype=torch.float32)
    precision = dot_precision(mixing.dtype)
    settings = fit(tuning("mix_within_backward", values.device), 1, value_dim)
    settings["BT"] = min(settings["BT"], table.chunk)
    launch(
        mix_within_backward_kernel, (batch * heads * table.chunks * (table.chunk // settings["BT"]),),
        d_mixing, d_weights, d_out, mixing, values, weights, table.token_death, table.document_start,
        table.chunks, tokens, heads, C=table.chunk, V=value_dim, S=table.capacity, PRECISION=precision, **settings,
    )  # fmt: skip
    settings = fit(tuning("mix_values_backward", values.device), 1, value_dim)
    launch(
        mix_values_backward_kernel, (batch * heads * table.chunks * cdiv(value_dim, settings["BV"]),),
        d_values, d_out, mixing, weights, table.token_death, table.document_start, table.chunks, tokens, heads,
        C=table.chunk, V=value_dim, S=table.capacity, PRECISION=precision, **settings,
    )  # fmt: skip
    return d_mixing, d_weights, d_values


@dataclass
class _Gradients:
    """What the kernels of the reverse pass write, group by group."""

    query: Tensor
    query_open: Tensor | None
    key_end: Tensor
    decay: Tensor
    """[blocks of K, B, H, N], to be summed over blocks."""
    erase: Tensor | None
    restore: Tensor | None
    slot_weights: Tensor
    """[blocks of K, B, H, N, S, C], likewise; zero where no slot is."""

    @classmethod
    def empty(
        cls, query: Tensor, query_open: Tensor | None, key_end: Tensor, decay: Tensor, erase: Tensor | None,
        by_slot: Tensor,
    ) -> _Gradients:  # fmt: skip
        blocks = cdiv(query.shape[-1], fit(tuning("mix_read_backward", query.device), query.shape[-1], 1)["BK"])
        return cls(
            query=torch.empty_like(query),
            query_open=None if query_open is None else torch.empty_like(query_open),
            key_end=torch.empty_like(key_end),
            decay=torch.empty(blocks, *decay.shape, dtype=decay.dtype, device=decay.device),
            erase=None if erase is None else torch.empty_like(erase),
            restore=None if erase is None else torch.empty_like(erase),
            slot_weights=by_slot.new_zeros(blocks, *by_slot.shape),
        )

    def of_reads(
        self, group: Group, d_out: Tensor, query: Tensor, query_open: Tensor | None, by_slot: Tensor, states: Tensor,
        adjoints: Tensor,
    ) -> None:  # fmt: skip
        table = group.table
        batch, heads, rows, slots, key_dim, value_dim = states.shape
        settings = fit(tuning("mix_read_backward", query.device), key_dim, value_dim)
        launch(
            mix_read_backward_kernel, (batch * heads * group.count * len(self.decay),),
            self.query, self.query_open, self.slot_weights, self.decay, d_out, query, query_open, by_slot, states,
            adjoints, group.version, group.factor, table.start, table.fill,
            group.first, group.count, table.chunks, table.tokens, heads, rows, batch * heads,
            C=table.chunk, K=key_dim, V=value_dim, S=slots, SP=power_of_2(slots), FROZEN=group.frozen,
            PRECISION=dot_precision(query.dtype), **settings,
        )  # fmt: skip

    def of_writes(self, group: Group, d_values: Tensor, key_end: Tensor, values: Tensor, adjoints: Tensor) -> None:
        table = group.table
        batch, heads, rows, slots, key_dim, value_dim = adjoints.shape
        settings = fit(tuning("mix_write_backward", values.device), key_dim, value_dim)
        settings["BT"] = min(settings["BT"], table.chunk)
        launch(
            mix_write_backward_kernel, (batch * heads * group.count * (table.chunk // settings["BT"]),),
            self.key_end, d_values, key_end, values, adjoints, table.start, table.fill,
            group.first, group.count, table.chunks, table.tokens, heads, rows,
            C=table.chunk, K=key_dim, V=value_dim, S=slots, SP=power_of_2(slots), N_K=cdiv(key_dim, settings["BK"]),
            PRECISION=dot_precision(key_end.dtype), **settings,
        )  # fmt: skip

    def of_erasing(self, group: Group, states: Tensor, adjoints: Tensor) -> None:
        table, transition = group.table, group.transition
        batch, heads, rows, slots, key_dim, value_dim = states.shape
        settings = fit(tuning("mix_erase_backward", states.device), key_dim, value_dim)
        assert transition.erase is not None
        for of_erase, grad, other in (
            (True, self.erase, transition.restore),
            (False, self.restore, transition.erase),
        ):
            launch(
                mix_erase_backward_kernel, (batch * heads * group.count,),
                grad, other, states, adjoints, group.version, table.start, table.fill,
                group.first, group.count, table.chunks, rows,
                C=table.chunk, K=key_dim, V=value_dim, S=slots, SP=power_of_2(slots), N_K=cdiv(key_dim, settings["BK"]),
                FROZEN=group.frozen, OF_ERASE=of_erase, PRECISION=dot_precision(transition.erase.dtype), **settings,
            )  # fmt: skip
