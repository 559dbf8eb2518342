"""Read weights in Triton: by old slot for mixing, through soft gates, and by content (docs/dla.md 2.5, 2.6 and 5).

Weights are [B, T, H, S] float32 by recency rank. Every kernel works on the rows of one block of tokens and writes each
element once; what crosses chunks (a gate is read by every later token) is summed per chunk and then chunk by chunk in a
fixed order, never by atomics.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.launch import cdiv, launch, power_of_2, tuning
from dla_kernels.memory.table import SlotTable
from dla_kernels.memory.table_triton import (
    alive_tokens,
    chunk_block,
    load_slots,
    load_tokens,
    newer_alive,
    reads_slots,
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
    b_l = (i_n * C).to(tl.int32) + tl.arange(0, BC)
    m_alive = alive_tokens(p_token_death, i_bh, b_l, (tl.arange(0, BC) < C) & (b_l < T), b_t, b_d, T)
    b_here = tl.sum(m_alive.to(tl.int32), 1)

    b_start, b_death = load_slots(p_start, p_death, i_bh * (N + 1) + i_n, o_s, S)
    m_reads = reads_slots(b_start, b_d)
    b_rank, _ = newer_alive(m_reads & (b_death[None, :] > b_t[:, None]))
    b_rank = tl.minimum(b_rank + b_here[:, None], S - 1)
    p_row = p_weights + ((i_bh // H * T + b_t) * H + i_bh % H)[:, None] * S
    b_w = tl.load(p_row + b_rank, mask=m_reads, other=0.0)
    p_o = p_out + ((i_bh * N + i_n) * S + o_s[None, :]) * C + o_t[:, None]
    tl.store(p_o, b_w, mask=(o_s < S)[None, :] & (o_t < C)[:, None])


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
        b_rank += (m_reads & (tl.load(p_death + i_edge * S + i_s) > b_t)).to(tl.int32)
    p_row = p_d_weights + ((i_bh // H * T + b_t) * H + i_bh % H)[:, None] * S + o_r[None, :]
    m_row = m_t[:, None] & (o_r < S)[None, :]
    tl.store(p_row, tl.load(p_row, mask=m_row, other=0.0) + b_acc, mask=m_row)


def slot_weights_by_slot(weights: Tensor, table: SlotTable) -> Tensor:
    """Read weights [B, T, H, S] float32 by old slot: [B, H, N, S, C] float32, 0 where a slot is unused or not read.

    Entry [b, h, n, i, c] is the weight, at token n * C + c, of what slot i of edge n has become.
    """
    weights = weights.contiguous()
    batch, tokens, heads, slots = weights.shape
    out = weights.new_empty(batch, heads, table.chunks, slots, table.chunk, dtype=torch.float32)
    grid, blocks = _chunk_grid("slot_weights_by_slot", table, weights)
    launch(
        slot_weights_by_slot_kernel, grid, weights, table.start, table.death, table.token_death, table.document_start,
        out, tokens, heads, table.chunks, **blocks,
    )  # fmt: skip
    return out


def add_slot_weight_gradients(d_by_slot: Tensor, d_weights: Tensor, table: SlotTable) -> None:
    """Backward of `slot_weights_by_slot`: adds d_by_slot [B, H, N, S, C] into d_weights [B, T, H, S], contiguous."""
    assert d_weights.is_contiguous()
    _, tokens, heads, _ = d_weights.shape
    grid, blocks = _chunk_grid("add_slot_weight_gradients", table, d_weights)
    launch(
        add_slot_weight_gradients_kernel, grid, d_by_slot.contiguous(), d_weights, table.start, table.death, table.fill,
        table.token_death, table.document_start, tokens, heads, table.chunks, **blocks,
    )  # fmt: skip


def _chunk_grid(kernel: str, table: SlotTable, like: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """(grid, constants) of a kernel with a program for every BT tokens of every chunk of every head."""
    blocks = tuning(kernel, like.device)
    width = power_of_2(table.chunk, 16)
    blocks |= {"BC": width, "BT": min(blocks["BT"], width), "BS": power_of_2(table.capacity, 8)}
    batch, heads = table.fill.shape[:2]
    grid = (batch * heads * table.chunks * cdiv(table.chunk, blocks["BT"]),)
    return grid, blocks | {"S": table.capacity, "C": table.chunk}
