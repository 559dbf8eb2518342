"""Read weights in Triton: by old slot for mixing, through soft gates, and by content (docs/dla.md 2.5, 2.6 and 5).

Weights are [B, T, H, S] float32 by recency rank. A program owns the rows of a block of tokens; what it needs by rank
(the gates p) it first puts into rows of its own output. What crosses chunks, a gate being read by every later token, is
summed per chunk and then chunk by chunk in a fixed order, never by atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dla_kernels.launch import cdiv, eager, launch, power_of_2, tuning
from dla_kernels.memory.table import SlotTable
from dla_kernels.memory.table_triton import (
    FAR,
    alive_tokens,
    boundary_ranks,
    chunk_block,
    chunk_grid,
    chunk_row,
    load_slots,
    load_tokens,
    reads_slots,
    store_by_rank,
)


@triton.jit(do_not_specialize=["T", "H", "N"])
def slot_weights_by_slot_kernel(
    p_weights, p_start, p_death, p_token_death, p_document_start, p_out, T, H, N,
    S: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The weight of every old slot of a chunk at a block of its tokens; 0 where not readable."""
    i_bh, i_n, o_t = chunk_block(N, C, BT)
    o_s = tl.arange(0, BS)
    b_t, b_d, m_t = load_tokens(p_document_start, i_bh // H, i_n, o_t, T, C)
    b_start, b_death = load_slots(p_start, p_death, i_bh * (N + 1) + i_n, o_s, S)
    _, _, _, b_rank, _ = boundary_ranks(p_token_death, i_bh, i_n, b_start, b_death, b_t, b_d, T, C, BC)
    p_weights += chunk_row(i_bh, i_n, T, H, S, C)
    o_rank = o_t[:, None] * (H * S) + tl.minimum(b_rank, S - 1)
    b_w = tl.load(p_weights + o_rank, mask=reads_slots(b_start, b_d), other=0.0)
    p_out += (i_bh * N + i_n) * S * C
    tl.store(p_out + (o_s[None, :] * C + o_t[:, None]), b_w, mask=(o_s < S)[None, :] & (o_t < C)[:, None])


@triton.jit(do_not_specialize=["T", "H", "N"])
def add_slot_weight_gradients_kernel(
    p_by_slot, p_d_weights, p_start, p_death, p_fill, p_token_death, p_document_start, T, H, N,
    S: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Add the gradients by old slot at each slot's rank, for a block of a chunk's tokens."""
    i_bh, i_n, o_t = chunk_block(N, C, BT)
    o_r = tl.arange(0, BS)
    b_t, b_d, m_t = load_tokens(p_document_start, i_bh // H, i_n, o_t, T, C)
    b_l = (i_n * C).to(tl.int32) + tl.arange(0, BC)
    m_alive = alive_tokens(p_token_death, i_bh, b_l, (tl.arange(0, BC) < C) & (b_l < T), b_t, b_d, T)
    b_rank = tl.sum(m_alive.to(tl.int32), 1)

    i_edge = i_bh * (N + 1) + i_n
    p_slot = p_by_slot + (i_bh * N + i_n) * S * C + o_t
    n_slots = tl.load(p_fill + i_edge)
    b_acc = tl.zeros([BT, BS], tl.float32)
    # Newest first: the rank of a slot is the number of boundaries met alive before it.
    for i in range(n_slots):
        i_s = tl.cast(n_slots - 1 - i, tl.int64)
        m_reads = tl.load(p_start + i_edge * S + i_s) >= b_d
        b_dw = tl.load(p_slot + i_s * C, mask=m_reads, other=0.0)
        b_acc += tl.where(tl.minimum(b_rank, S - 1)[:, None] == o_r[None, :], b_dw[:, None], 0.0)
        b_rank += (tl.load(p_death + i_edge * S + i_s) > b_t).to(tl.int32)
    p_row = p_d_weights + chunk_row(i_bh, i_n, T, H, S, C) + (o_t[:, None] * (H * S) + o_r[None, :])
    m_row = m_t[:, None] & (o_r < S)[None, :]
    tl.store(p_row, tl.load(p_row, mask=m_row, other=0.0) + b_acc, mask=m_row)


@triton.jit
def _slot_gates(
    p_gates, p_carried, p_start, i_bh, b_start, T, H, N, S: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Gate [BS] of the boundary that opened each old slot b_start: of its token, or of the carried slot it was."""
    m_here = (b_start >= 0) & (b_start < FAR)
    p_gate = p_gates + (i_bh // H * T + tl.where(m_here, b_start, 0)) * H + i_bh % H
    b_gate = tl.load(p_gate, mask=m_here, other=1.0).to(tl.float32)
    if p_carried is not None:
        o_c = tl.arange(0, BS)
        b_first = tl.load(p_start + i_bh * (N + 1) * S + o_c, mask=o_c < S, other=FAR)
        b_carried = tl.load(p_carried + i_bh * S + o_c, mask=o_c < S, other=0.0).to(tl.float32)
        m_same = b_first[None, :] == b_start[:, None]
        b_was = tl.sum(tl.where(m_same, b_carried[None, :], 0.0), 1)
        b_gate = tl.where(b_start < 0, b_was, b_gate)
    return b_gate


@triton.jit
def _token_gates(p_gates, i_bh, i_n, T, H, C: tl.constexpr, BC: tl.constexpr):
    """Gate [BC] of each token of a chunk."""
    o_l = tl.arange(0, BC)
    b_l = (i_n * C).to(tl.int32) + o_l
    m_l = (o_l < C) & (b_l < T)
    return tl.load(p_gates + (i_bh // H * T + b_l) * H + i_bh % H, mask=m_l, other=1.0).to(tl.float32)


@triton.jit
def _then(a, b, a_next, b_next):
    """x -> a x + b, and then x -> a_next x + b_next."""
    return a * a_next, b * a_next + b_next


@triton.jit(do_not_specialize=["T", "H", "N"])
def gate_weights_kernel(
    p_weights, p_gates, p_carried, p_start, p_death, p_token_death, p_document_start, p_out, T, H, N,
    S: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """w_0 = lambda_0, w_r = p_r lambda_r + (1 - p_r) w_(r-1) for a block of tokens; `p_out` first holds p."""
    i_bh, i_n, o_t = chunk_block(N, C, BT)
    o_r = tl.arange(0, BS)
    b_t, b_d, m_t = load_tokens(p_document_start, i_bh // H, i_n, o_t, T, C)
    b_start, b_death = load_slots(p_start, p_death, i_bh * (N + 1) + i_n, o_r, S)
    m_token, b_token, m_slot, b_slot, _ = boundary_ranks(p_token_death, i_bh, i_n, b_start, b_death, b_t, b_d, T, C, BC)
    o_chunk = chunk_row(i_bh, i_n, T, H, S, C)
    o_row = o_t * (H * S)
    b_here = _token_gates(p_gates, i_bh, i_n, T, H, C, BC)
    b_old = _slot_gates(p_gates, p_carried, p_start, i_bh, b_start, T, H, N, S, BS)
    # Between ranks r and r-1 lies the boundary that starts slot r-1: hence the shift by one rank.
    p_out += o_chunk
    store_by_rank(p_out, o_row, m_t, m_token, b_token, b_here, m_slot, b_slot, b_old, 1.0, 1, S, BS)

    m_row = m_t[:, None] & (o_r < S)[None, :]
    o_x = o_row[:, None] + o_r[None, :]
    b_p = tl.load(p_out + o_x, mask=m_row, other=1.0)
    b_w = tl.load(p_weights + o_chunk + o_x, mask=m_row, other=0.0)
    b_p = tl.where(o_r[None, :] == 0, 1.0, b_p)
    _, b_w = tl.associative_scan((1.0 - b_p, b_p * b_w), 1, _then)
    tl.debug_barrier()
    tl.store(p_out + o_x, b_w, mask=m_row)


@triton.jit(do_not_specialize=["T", "H", "N"])
def gate_weights_backward_kernel(
    p_weights, p_gated, p_d_gated, p_gates, p_carried, p_start, p_death, p_token_death, p_document_start,
    p_d_weights, p_d_token, p_d_slot, T, H, N,
    S: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Adjoints of a chunk's weights, and of the gates it reads across: those of its tokens and of its old slots.

    Rows of `p_d_weights` first hold p, then the adjoint of p, then what they are for.
    """
    i_n = tl.program_id(0).to(tl.int64) % N
    i_bh = tl.program_id(0).to(tl.int64) // N
    o_s = tl.arange(0, BS)
    o_l = tl.arange(0, BC)
    b_start, b_death = load_slots(p_start, p_death, i_bh * (N + 1) + i_n, o_s, S)
    b_here = _token_gates(p_gates, i_bh, i_n, T, H, C, BC)
    b_old = _slot_gates(p_gates, p_carried, p_start, i_bh, b_start, T, H, N, S, BS)
    b_d_token = tl.zeros([BC], tl.float32)
    b_d_slot = tl.zeros([BS], tl.float32)
    # Oldest rank first: column x is rank S - 1 - x, and adjoints pass from a rank to the next newer one.
    o_r = S - 1 - o_s
    o_chunk = chunk_row(i_bh, i_n, T, H, S, C)
    p_weights += o_chunk
    p_gated += o_chunk
    p_d_gated += o_chunk
    p_d_weights += o_chunk
    for i in range((C + BT - 1) // BT):
        o_t = i * BT + tl.arange(0, BT)
        b_t, b_d, m_t = load_tokens(p_document_start, i_bh // H, i_n, o_t, T, C)
        m_token, b_token, m_slot, b_slot, _ = boundary_ranks(
            p_token_death, i_bh, i_n, b_start, b_death, b_t, b_d, T, C, BC
        )
        o_row = o_t * (H * S)
        store_by_rank(p_d_weights, o_row, m_t, m_token, b_token, b_here, m_slot, b_slot, b_old, 1.0, 1, S, BS)

        o_x = o_row[:, None] + o_r[None, :]
        m_row = m_t[:, None] & (o_r >= 0)[None, :]
        m_inner = m_row & (o_r > 0)[None, :]
        b_p = tl.load(p_d_weights + o_x, mask=m_row, other=1.0)
        b_p_older = tl.load(p_d_weights + o_x + 1, mask=m_row & (o_r < S - 1)[None, :], other=1.0)
        b_w = tl.load(p_weights + o_x, mask=m_row, other=0.0)
        b_newer = tl.load(p_gated + o_x - 1, mask=m_inner, other=0.0)
        b_dw = tl.load(p_d_gated + o_x, mask=m_row, other=0.0)
        _, b_dw = tl.associative_scan((1.0 - b_p_older, b_dw), 1, _then)
        tl.debug_barrier()
        tl.store(p_d_weights + o_x, tl.where(m_inner, b_dw * (b_w - b_newer), 0.0), mask=m_row)
        tl.debug_barrier()
        b_dp = tl.load(p_d_weights + (o_row[:, None] + 1 + b_token), mask=m_token & (b_token < S - 1), other=0.0)
        b_d_token += tl.sum(b_dp, 0)
        b_dp = tl.load(p_d_weights + (o_row[:, None] + 1 + b_slot), mask=m_slot & (b_slot < S - 1), other=0.0)
        b_d_slot += tl.sum(b_dp, 0)
        tl.debug_barrier()
        tl.store(p_d_weights + o_x, b_p * b_dw, mask=m_row)
    b_l = (i_n * C).to(tl.int32) + o_l
    tl.store(p_d_token + i_bh * T + b_l, b_d_token, mask=(o_l < C) & (b_l < T))
    tl.store(p_d_slot + (i_bh * N + i_n) * S + o_s, b_d_slot, mask=o_s < S)


@triton.jit(do_not_specialize=["N"])
def gate_adjoints_kernel(p_start, p_d_slot, N, S: tl.constexpr, BS: tl.constexpr):
    """Add to every old slot's gate adjoint [B, H, N, S] those of later chunks, last chunk first."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BS)
    m_s = o_s < S
    i_last = i_bh * (N + 1) + N
    b_next = tl.load(p_start + i_last * S + o_s, mask=m_s, other=FAR)
    b_adjoint = tl.zeros([BS], tl.float32)
    for i in range(N):
        n = N - 1 - i
        p_d = p_d_slot + (i_bh * N + n) * S + o_s
        b_start = tl.load(p_start + (i_bh * (N + 1) + n) * S + o_s, mask=m_s, other=FAR)
        m_same = (b_start[:, None] == b_next[None, :]) & (b_start < FAR)[:, None]
        b_later = tl.sum(tl.where(m_same, b_adjoint[None, :], 0.0), 1)
        b_adjoint = tl.load(p_d, mask=m_s, other=0.0) + b_later
        tl.store(p_d, b_adjoint, mask=m_s)
        b_next = b_start


@triton.jit(do_not_specialize=["T", "H", "N"])
def gate_gradients_kernel(
    p_start, p_d_token, p_d_slot, p_d_gates, T, H, N,
    S: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """d gates [B, T, H] of a chunk: what its own tokens read, and what later chunks read of the slots it opened."""
    i_n = tl.program_id(0).to(tl.int64) % N
    i_bh = tl.program_id(0).to(tl.int64) // N
    o_s = tl.arange(0, BS)
    o_l = tl.arange(0, BC)
    b_l = (i_n * C).to(tl.int32) + o_l
    m_l = (o_l < C) & (b_l < T)
    m_s = (o_s < S) & (i_n + 1 < N)
    b_start = tl.load(p_start + (i_bh * (N + 1) + i_n + 1) * S + o_s, mask=m_s, other=FAR)
    b_later = tl.load(p_d_slot + (i_bh * N + i_n + 1) * S + o_s, mask=m_s, other=0.0)
    b_d = tl.load(p_d_token + i_bh * T + b_l, mask=m_l, other=0.0)
    b_d += tl.sum(tl.where(b_start[None, :] == b_l[:, None], b_later[None, :], 0.0), 1)
    tl.store(p_d_gates + (i_bh // H * T + b_l) * H + i_bh % H, b_d, mask=m_l)


@triton.jit
def _shares(p_affinity, p_sharpness, o_x, m_x, H, S: tl.constexpr, BS: tl.constexpr):
    """(affinity, softmax over live slots and a null slot of logit 0, live, sharpness) of rows o_x."""
    o_s = tl.arange(0, BS)
    m_row = m_x[:, None] & (o_s < S)[None, :]
    b_affinity = tl.load(p_affinity + o_x[:, None] * S + o_s[None, :], mask=m_row, other=float("-inf"))
    b_sharpness = tl.load(p_sharpness + o_x % H, mask=m_x, other=0.0).to(tl.float32)
    m_live = b_affinity > float("-inf")
    b_affinity = tl.where(m_live, b_affinity, 0.0)
    b_logit = b_sharpness[:, None] * b_affinity
    # A dead slot's logit of 0 is the null slot's: the maximum may count it.
    b_most = tl.maximum(tl.max(b_logit, 1), 0.0)
    b_e = tl.where(m_live, tl.exp(b_logit - b_most[:, None]), 0.0)
    return b_affinity, b_e / (tl.sum(b_e, 1) + tl.exp(-b_most))[:, None], m_live, b_sharpness


@triton.jit(do_not_specialize=["rows", "H"])
def content_weights_kernel(
    p_slot, p_affinity, p_gain, p_sharpness, p_out, rows, H, S: tl.constexpr, BS: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """w = slot + gain * softmax(sharpness * affinity), for a block of tokens and heads; the null slot gets a share."""
    o_x = tl.program_id(0).to(tl.int64) * BX + tl.arange(0, BX)
    o_s = tl.arange(0, BS)
    m_x = o_x < rows
    _, b_share, _, _ = _shares(p_affinity, p_sharpness, o_x, m_x, H, S, BS)
    b_gain = tl.load(p_gain + o_x % H, mask=m_x, other=0.0).to(tl.float32)
    m_row = m_x[:, None] & (o_s < S)[None, :]
    b_slot = tl.load(p_slot + o_x[:, None] * S + o_s[None, :], mask=m_row, other=0.0).to(tl.float32)
    tl.store(p_out + o_x[:, None] * S + o_s[None, :], b_slot + b_gain[:, None] * b_share, mask=m_row)


@triton.jit(do_not_specialize=["rows", "H"])
def content_weights_backward_kernel(
    p_d_out, p_affinity, p_gain, p_sharpness, p_d_affinity, p_d_gain, p_d_sharpness, rows, H,
    S: tl.constexpr, BS: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """d affinity, and each row's part of d gain and d sharpness."""
    o_x = tl.program_id(0).to(tl.int64) * BX + tl.arange(0, BX)
    o_s = tl.arange(0, BS)
    m_x = o_x < rows
    b_affinity, b_share, m_live, b_sharpness = _shares(p_affinity, p_sharpness, o_x, m_x, H, S, BS)
    b_gain = tl.load(p_gain + o_x % H, mask=m_x, other=0.0).to(tl.float32)
    m_row = m_x[:, None] & (o_s < S)[None, :]
    b_d = tl.load(p_d_out + o_x[:, None] * S + o_s[None, :], mask=m_row, other=0.0).to(tl.float32)
    b_inner = tl.sum(b_share * b_d, 1)
    b_d_logit = tl.where(m_live, b_gain[:, None] * b_share * (b_d - b_inner[:, None]), 0.0)
    tl.store(p_d_affinity + o_x[:, None] * S + o_s[None, :], b_sharpness[:, None] * b_d_logit, mask=m_row)
    tl.store(p_d_gain + o_x, b_inner, mask=m_x)
    tl.store(p_d_sharpness + o_x, tl.sum(b_affinity * b_d_logit, 1), mask=m_x)


def slot_weights_by_slot(weights: Tensor, table: SlotTable) -> Tensor:
    """Read weights [B, T, H, S] float32 by old slot: [B, H, N, S, C] float32, 0 where a slot is unused or not read.

    Entry [b, h, n, i, c] is the weight, at token n * C + c, of what slot i of edge n has become.
    """
    weights = weights.contiguous()
    batch, tokens, heads, slots = weights.shape
    out = weights.new_empty(batch, heads, table.chunks, slots, table.chunk, dtype=torch.float32)
    grid, blocks = chunk_grid("slot_weights_by_slot", table, weights)
    launch(
        slot_weights_by_slot_kernel, grid, weights, table.start, table.death, table.token_death, table.document_start,
        out, tokens, heads, table.chunks, **blocks,
    )  # fmt: skip
    return out


def add_slot_weight_gradients(d_by_slot: Tensor, d_weights: Tensor, table: SlotTable) -> None:
    """Backward of `slot_weights_by_slot`: adds d_by_slot [B, H, N, S, C] into d_weights [B, T, H, S], contiguous."""
    assert d_weights.is_contiguous()
    _, tokens, heads, _ = d_weights.shape
    grid, blocks = chunk_grid("add_slot_weight_gradients", table, d_weights)
    launch(
        add_slot_weight_gradients_kernel, grid, d_by_slot.contiguous(), d_weights, table.start, table.death, table.fill,
        table.token_death, table.document_start, tokens, heads, table.chunks, **blocks,
    )  # fmt: skip


class _GateReadWeights(torch.autograd.Function):
    """Read weights through soft gates. Keeps its inputs and its output; p is made again in backward."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, gates: Tensor, carried: Tensor | None, table: SlotTable) -> Tensor:
        _, tokens, heads, _ = weights.shape
        out = torch.empty_like(weights)
        grid, blocks = chunk_grid("gate_weights", table, weights)
        launch(
            gate_weights_kernel, grid, weights, gates, carried, table.start, table.death, table.token_death,
            table.document_start, out, tokens, heads, table.chunks, **blocks,
        )  # fmt: skip
        ctx.save_for_backward(weights, gates, carried, out)
        ctx.table = table
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, gates, carried, out = ctx.saved_tensors
        table: SlotTable = ctx.table
        batch, tokens, heads, slots = weights.shape
        d_weights, d_gates = torch.empty_like(weights), torch.empty_like(gates)
        d_token = weights.new_empty(batch, heads, tokens)
        d_slot = weights.new_empty(batch, heads, table.chunks, slots)
        _, blocks = chunk_grid("gate_weights_backward", table, weights)
        programs = batch * heads * table.chunks
        launch(
            gate_weights_backward_kernel, (programs,), weights, out, grads[0].contiguous(), gates, carried, table.start,
            table.death, table.token_death, table.document_start, d_weights, d_token, d_slot, tokens, heads,
            table.chunks, **blocks,
        )  # fmt: skip
        sizes = {"S": slots, "BS": blocks["BS"]}
        launch(
            gate_adjoints_kernel, (batch * heads,), table.start, d_slot, table.chunks, **sizes,
            **tuning("gate_adjoints", weights.device),
        )  # fmt: skip
        launch(
            gate_gradients_kernel, (programs,), table.start, d_token, d_slot, d_gates, tokens, heads, table.chunks,
            C=table.chunk, BC=blocks["BC"], **sizes, **tuning("gate_gradients", weights.device),
        )  # fmt: skip
        return d_weights, d_gates, None if carried is None else d_slot[:, :, 0].to(carried.dtype), None


@eager
def gate_read_weights_triton(
    weights: Tensor, gates: Tensor, table: SlotTable, carried_gates: Tensor | None = None
) -> Tensor:
    """Read weights [B, T, H, S] float32 by recency rank, through the gates [B, T, H] of boundaries.

    carried_gates [B, H, S]: of the slots a cache carries in (None: 1). Differentiable in all three.
    """
    carried = None if carried_gates is None else carried_gates.contiguous()
    gated: Tensor = _GateReadWeights.apply(weights.contiguous(), gates.contiguous(), carried, table)
    return gated


class _ContentReadWeights(torch.autograd.Function):
    """slot + gain * softmax over live slots and a null slot. Keeps the affinity; the shares are made again."""

    @staticmethod
    def forward(ctx: Any, slot_weights: Tensor, affinity: Tensor, gain: Tensor, sharpness: Tensor) -> Tensor:
        heads, slots = affinity.shape[-2:]
        out = torch.empty_like(slot_weights, dtype=torch.float32)
        grid, blocks, rows = _row_grid("content_weights", affinity)
        launch(content_weights_kernel, grid, slot_weights, affinity, gain, sharpness, out, rows, heads, **blocks)
        ctx.save_for_backward(affinity, gain, sharpness)
        ctx.slot_dtype = slot_weights.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        affinity, gain, sharpness = ctx.saved_tensors
        heads, upstream = affinity.shape[-2], grads[0].contiguous()
        d_affinity = torch.empty_like(affinity)
        d_gain = torch.empty(affinity.shape[:-1], dtype=torch.float32, device=affinity.device)
        d_sharpness = torch.empty_like(d_gain)
        grid, blocks, rows = _row_grid("content_weights_backward", affinity)
        launch(
            content_weights_backward_kernel, grid, upstream, affinity, gain, sharpness, d_affinity, d_gain, d_sharpness,
            rows, heads, **blocks,
        )  # fmt: skip
        d_gain, d_sharpness = (x.view(-1, heads).sum(0) for x in (d_gain, d_sharpness))
        return upstream.to(ctx.slot_dtype), d_affinity, d_gain.to(gain.dtype), d_sharpness.to(sharpness.dtype)


def _row_grid(kernel: str, rows: Tensor) -> tuple[tuple[int], dict[str, int], int]:
    """(grid, constants, rows) of a kernel on blocks of BX rows of the last axis."""
    settings = tuning(kernel, rows.device)
    slots = rows.shape[-1]
    count = rows.numel() // slots
    return (cdiv(count, settings["BX"]),), settings | {"S": slots, "BS": power_of_2(slots, 8)}, count


@eager
def content_read_weights_triton(slot_weights: Tensor, affinity: Tensor, gain: Tensor, sharpness: Tensor) -> Tensor:
    """slot + gain_h * softmax(sharpness_h * affinity | null slot): [B, T, H, S] float32, gain and sharpness [H].

    Slots of affinity -inf get no content weight, and no gradient. Differentiable in all four.
    """
    tensors = (x.contiguous() for x in (slot_weights, affinity, gain, sharpness))
    weights: Tensor = _ContentReadWeights.apply(*tensors)
    return weights
