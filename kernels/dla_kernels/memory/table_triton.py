"""SlotTable in Triton: its making, and what other kernels derive from it (memory/table.py; docs/dla.md section 5).

Ranks are counts of boundaries alive: the slot of in-chunk token l has, at token t, the rank of boundaries in (l, t]
alive at t; old slot i that of in-chunk boundaries and of newer old slots alive at t. Rows that do not exist (padding)
are given a document that starts at FAR, so that they see nothing and no mask has to follow them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.launch import cdiv, launch, power_of_2, tuning
from dla_kernels.memory.table import SlotTable
from dla_kernels.plan import MemoryPlan

FAR = tl.constexpr(2**31 - 1)


@triton.jit
def chunk_block(N, C: tl.constexpr, BT: tl.constexpr):
    """(i_bh int64, i_n int64, places o_t [BT] in the chunk) of a program on a block of a chunk's tokens."""
    i = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (C + BT - 1) // BT
    o_t = (i % blocks).to(tl.int32) * BT + tl.arange(0, BT)
    return i // blocks // N, (i // blocks) % N, o_t


@triton.jit
def load_tokens(p_document_start, i_b, i_n, o_t, T, C: tl.constexpr):
    """(token b_t, first token of its document b_d, whether it exists) of places o_t in chunk i_n; b_d FAR if not."""
    b_t = (i_n * C).to(tl.int32) + o_t
    m_t = (o_t < C) & (b_t < T)
    return b_t, tl.load(p_document_start + i_b * T + b_t, mask=m_t, other=FAR), m_t


@triton.jit
def load_slots(p_start, p_death, i_edge, o_s, S: tl.constexpr):
    """(first token, death) of slots o_s of edge i_edge = bh * (N + 1) + n; FAR and -1 where unused."""
    m_s = o_s < S
    b_start = tl.load(p_start + i_edge * S + o_s, mask=m_s, other=FAR)
    return b_start, tl.load(p_death + i_edge * S + o_s, mask=m_s, other=-1)


@triton.jit
def alive_tokens(p_token_death, i_bh, b_l, m_l, b_t, b_d, T):
    """[BT, BL] bool: token b_l is a boundary alive at token b_t."""
    b_death = tl.load(p_token_death + i_bh * T + b_l, mask=m_l, other=-1)
    return (b_death[None, :] > b_t[:, None]) & (b_l[None, :] <= b_t[:, None]) & (b_l[None, :] >= b_d[:, None])


@triton.jit
def reads_slots(b_start, b_d):
    """[BT, BS] bool: the old slot is used and of the token's document."""
    return (b_start < FAR)[None, :] & (b_start[None, :] >= b_d[:, None])


@triton.jit
def newer_alive(m_alive):
    """(rank [BT, BX] by the boundaries alive [BT, BX], number of these [BT]): how many of them come after each."""
    b_alive = m_alive.to(tl.int32)
    b_all = tl.sum(b_alive, 1)
    return b_all[:, None] - tl.cumsum(b_alive, 1), b_all


@triton.jit
def boundary_ranks(p_token_death, i_bh, i_n, b_start, b_death, b_t, b_d, T, C: tl.constexpr, BC: tl.constexpr):
    """Boundaries alive at tokens b_t and how many come after each: (m_token, b_token [BT, BC]) in the chunk,
    (m_slot, b_slot [BT, BS]) of old slots b_start, b_death, and the number b_here [BT] in the chunk."""
    o_l = tl.arange(0, BC)
    b_l = (i_n * C).to(tl.int32) + o_l
    m_token = alive_tokens(p_token_death, i_bh, b_l, (o_l < C) & (b_l < T), b_t, b_d, T)
    m_slot = reads_slots(b_start, b_d) & (b_death[None, :] > b_t[:, None])
    b_token, b_here = newer_alive(m_token)
    b_slot, _ = newer_alive(m_slot)
    return m_token, b_token, m_slot, b_slot + b_here[:, None], b_here


@triton.jit
def chunk_row(i_bh, i_n, T, H, S: tl.constexpr, C: tl.constexpr):
    """Where the row of a chunk's first token begins in [B, T, H, S]; that of place o_t lies o_t * H * S further (32
    bits)."""
    return ((i_bh // H * T + i_n * C) * H + i_bh % H) * S


@triton.jit
def store_by_rank(
    p_chunk, o_row, m_row, m_token, b_token_rank, b_token_value, m_slot, b_slot_rank, b_slot_value, fill,
    SHIFT: tl.constexpr, S: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Fill the rows of S elements at o_row [BT] with `fill`, then put every boundary's value at its rank + SHIFT.

    Whoever reads the rows finds them complete: the block waits here.
    """
    o_r = tl.arange(0, BS)
    tl.store(p_chunk + (o_row[:, None] + o_r[None, :]), fill, mask=m_row[:, None] & (o_r < S)[None, :])
    tl.debug_barrier()
    o_put = o_row[:, None] + SHIFT + b_token_rank
    tl.store(p_chunk + o_put, b_token_value[None, :], mask=m_token & (b_token_rank < S - SHIFT))
    o_put = o_row[:, None] + SHIFT + b_slot_rank
    tl.store(p_chunk + o_put, b_slot_value[None, :], mask=m_slot & (b_slot_rank < S - SHIFT))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["size"])
def token_deaths_kernel(p_boundary, p_death, p_out, size, BX: tl.constexpr):
    """Death of the boundary at each token, `FAR` at most, and -1 where there is none."""
    o_x = tl.program_id(0).to(tl.int64) * BX + tl.arange(0, BX)
    m_x = o_x < size
    m_boundary = tl.load(p_boundary + o_x, mask=m_x, other=0) != 0
    b_death = tl.minimum(tl.load(p_death + o_x, mask=m_x, other=0), FAR).to(tl.int32)
    tl.store(p_out + o_x, tl.where(m_boundary, b_death, -1), mask=m_x)


@triton.jit
def _load_edge(p_token_death, p_document_start, i_b, i_bh, n, T, C: tl.constexpr, BC: tl.constexpr):
    """(deaths [BC] of chunk n's boundaries, first token of the document its last token is in)."""
    o_l = tl.arange(0, BC)
    b_l = n * C + o_l
    b_death = tl.load(p_token_death + i_bh * T + b_l, mask=(o_l < C) & (b_l < T), other=-1)
    return b_death, tl.load(p_document_start + i_b * T + tl.minimum(n * C + C, T) - 1)


@triton.jit(do_not_specialize=["T", "H", "N"])
def slot_table_kernel(
    p_carried_start, p_carried_death, p_carried_fill, p_token_death, p_document_start, p_start, p_death, p_fill,
    T, H, N, S: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One head's slots from edge to edge: what is alive at the end of a chunk moves up, in order."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BS)
    m_s = o_s < S
    b_fill = tl.minimum(tl.load(p_carried_fill + i_bh), S).to(tl.int32)
    m_used = o_s < b_fill
    b_start = tl.load(p_carried_start + i_bh * S + o_s, mask=m_used, other=FAR).to(tl.int32)
    b_death = tl.minimum(tl.load(p_carried_death + i_bh * S + o_s, mask=m_used, other=-1), FAR).to(tl.int32)
    i_row = i_bh * (N + 1)
    tl.store(p_start + i_row * S + o_s, b_start, mask=m_s)
    tl.store(p_death + i_row * S + o_s, b_death, mask=m_s)
    tl.store(p_fill + i_row, b_fill)
    b_ends, b_d = _load_edge(p_token_death, p_document_start, i_bh // H, i_bh, 0, T, C, BC)
    for n in range(N):
        b_l = n * C + tl.arange(0, BC)
        end = tl.minimum(n * C + C, T)
        m_old = (b_death >= end) & (b_start >= b_d)
        m_new = (b_ends >= end) & (b_l >= b_d)
        b_old = tl.cumsum(m_old.to(tl.int32), 0) - 1
        n_old = tl.sum(m_old.to(tl.int32), 0)
        b_new = n_old + tl.cumsum(m_new.to(tl.int32), 0) - 1
        # A plan that keeps more than S slots alive loses its newest, and writes no further than its row.
        b_fill = tl.minimum(n_old + tl.sum(m_new.to(tl.int32), 0), S)
        i_row += 1
        p_s = p_start + i_row * S
        p_d = p_death + i_row * S
        tl.store(p_s + b_old, b_start, mask=m_old & (b_old < S))
        tl.store(p_d + b_old, b_death, mask=m_old & (b_old < S))
        tl.store(p_s + b_new, b_l, mask=m_new & (b_new < S))
        tl.store(p_d + b_new, b_ends, mask=m_new & (b_new < S))
        tl.store(p_s + o_s, tl.full([BS], FAR, tl.int32), mask=m_s & (o_s >= b_fill))
        tl.store(p_d + o_s, tl.full([BS], -1, tl.int32), mask=m_s & (o_s >= b_fill))
        tl.store(p_fill + i_row, b_fill)
        # Asked for before the block waits for its own row.
        b_ends, b_d = _load_edge(p_token_death, p_document_start, i_bh // H, i_bh, tl.minimum(n + 1, N - 1), T, C, BC)
        tl.debug_barrier()
        b_start = tl.load(p_s + o_s, mask=m_s, other=FAR)
        b_death = tl.load(p_d + o_s, mask=m_s, other=-1)


def chunk_grid(kernel: str, table: SlotTable, like: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """(grid, constants) of a kernel with a program for every BT tokens of every chunk of every head."""
    settings = tuning(kernel, like.device)
    width = power_of_2(table.chunk, 16)
    settings |= {"BC": width, "BT": min(settings["BT"], width), "BS": power_of_2(table.capacity, 8)}
    batch, heads = table.fill.shape[:2]
    grid = (batch * heads * table.chunks * cdiv(table.chunk, settings["BT"]),)
    return grid, settings | {"S": table.capacity, "C": table.chunk}


def slot_table_triton(plan: MemoryPlan, chunk: int) -> SlotTable:
    """The table of `plan` for chunks of `chunk` tokens, without waiting for the device.

    A plan that keeps more than its capacity alive is not refused here, as the torch path does: its newest slots are
    left out.
    """
    boundary, death = plan.boundary.transpose(1, 2).contiguous(), plan.death.transpose(1, 2).contiguous()
    batch, heads, tokens = boundary.shape
    capacity, chunks = plan.capacity, cdiv(tokens, chunk)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=boundary.device)

    table = SlotTable(
        start=new(batch, heads, chunks + 1, capacity),
        death=new(batch, heads, chunks + 1, capacity),
        fill=new(batch, heads, chunks + 1),
        token_death=new(batch, heads, tokens),
        document_start=plan.document_start.to(torch.int32).contiguous(),
        chunk=chunk,
    )
    settings = tuning("token_deaths", boundary.device)
    grid = (cdiv(boundary.numel(), settings["BX"]),)
    launch(token_deaths_kernel, grid, boundary, death, table.token_death, boundary.numel(), **settings)
    launch(
        slot_table_kernel, (batch * heads,), plan.carried_start.contiguous(), plan.carried_death.contiguous(),
        plan.carried_fill.contiguous(), table.token_death, table.document_start, table.start, table.death, table.fill,
        tokens, heads, chunks, S=capacity, C=chunk, BS=power_of_2(capacity, 2), BC=power_of_2(chunk, 2),
        **tuning("slot_table", boundary.device),
    )  # fmt: skip
    return table
