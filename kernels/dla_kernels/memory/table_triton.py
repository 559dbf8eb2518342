"""SlotTable in Triton: its making, and what other kernels derive from it (memory/table.py; docs/dla.md section 5).

Ranks are counts of boundaries alive: the slot of in-chunk token l has, at token t, the rank of boundaries in (l, t]
alive at t; old slot i that of in-chunk boundaries and of newer old slots alive at t. Rows that do not exist (padding)
are given a document that starts at FAR, so that they see nothing and no mask has to follow them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(2**31 - 1)


@triton.jit
def chunk_block(N, C: tl.constexpr, BT: tl.constexpr):
    """(i_bh int64, i_n int64, place o_t [BT] of its tokens in the chunk) of a program on a block of a chunk's tokens."""
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
