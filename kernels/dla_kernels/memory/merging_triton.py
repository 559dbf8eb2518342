# mypy: disable-error-code="no-untyped-def"
"""Capacity in Triton kernels: `capacity_merges` of merging.py (docs/dla.md section 2.3).

A list of at most S boundaries lives in one warp, a slot a lane, and takes one arriving boundary after the other; the
lists of different heads and documents run side by side. Every boundary waits for the one before it, so what counts is
the length of one step. Rule `oldest` needs none: the list is a queue. Rules `mass` and `density` compare sums of scores
in float32, with a known bound on their error, a block of boundaries at a time: where the bound leaves any choice of a
block open, which includes every tie, the block is walked again in float64, as the reference computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.launch import cdiv, launch, power_of_2, tuning
from dla_kernels.memory.merging import CAPACITY_RULES, Merges
from dla_kernels.plan import NEVER

_NEVER: tl.constexpr = tl.constexpr(NEVER)
_NO_DOCUMENT: tl.constexpr = tl.constexpr(-(2**31))


@triton.jit(do_not_specialize=["T", "H", "pieces"])
def boundary_lists_kernel(
    p_boundary, p_score, p_start, p_carried_start, p_carried_scores, p_carried_fill,
    p_position, p_document, p_prefix, p_carried_prefix, p_count, p_death, p_merged, p_carried_death, T, H, pieces,
    S: tl.constexpr, BS: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """The boundaries of one head in a row, the carried ones first, and the sums of scores before every token.

    position, document [B,H,S+T] int32 of the boundaries; prefix [B,H,T] and carried_prefix [B,H,S] float64; count
    [B,H,1+pieces] int32, boundaries before each piece of BX tokens. Results are set to no merge.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // H
    p_position += i_bh * (S + T)
    p_document += i_bh * (S + T)
    o_s = tl.arange(0, BS)
    i_count = tl.load(p_carried_fill + i_bh).to(tl.int32)
    m_s = o_s < i_count
    b_carried = tl.load(p_carried_scores + i_bh * S + o_s, mask=m_s, other=0.0)
    tl.store(p_carried_prefix + i_bh * S + o_s, -tl.cumsum(b_carried, 0, reverse=True), mask=m_s)
    tl.store(p_position + o_s, tl.load(p_carried_start + i_bh * S + o_s, mask=m_s, other=0).to(tl.int32), mask=m_s)
    tl.store(p_document + o_s, tl.load(p_start + i_b * T) + tl.zeros([BS], tl.int32), mask=m_s)
    tl.store(p_carried_death + i_bh * S + o_s, tl.full([BS], _NEVER, tl.int64), mask=o_s < S)
    tl.store(p_count + i_bh * (1 + pieces), 0)
    b_sum = tl.zeros([], tl.float64)
    for i_x in range(pieces):
        o_t = i_x * BX + tl.arange(0, BX)
        m_t = o_t < T
        b_boundary = tl.load(p_boundary + i_bh * T + o_t, mask=m_t, other=0).to(tl.int32)
        b_score = tl.load(p_score + i_bh * T + o_t, mask=m_t, other=0.0).to(tl.float64)
        b_start = tl.load(p_start + i_b * T + o_t, mask=m_t, other=0)
        o_e = i_count + tl.cumsum(b_boundary, 0) - b_boundary
        tl.store(p_position + o_e, o_t, mask=b_boundary > 0)
        tl.store(p_document + o_e, b_start, mask=b_boundary > 0)
        tl.store(p_prefix + i_bh * T + o_t, b_sum + tl.cumsum(b_score, 0) - b_score, mask=m_t)
        tl.store(p_death + i_bh * T + o_t, tl.full([BX], _NEVER, tl.int64), mask=m_t)
        tl.store(p_merged + i_bh * T + o_t, tl.full([BX], -1, tl.int64), mask=m_t)
        b_sum += tl.sum(b_score, 0)
        i_count += tl.sum(b_boundary, 0)
        tl.store(p_count + i_bh * (1 + pieces) + 1 + i_x, i_count)


@triton.jit
def _shifted(b_x, b_new, BY: tl.constexpr, S: tl.constexpr, L: tl.constexpr):
    """b_x [L] of the slot BY places newer; b_new beyond the last of S."""
    o_l = tl.arange(0, L)
    return tl.where(o_l >= S - BY, b_new, tl.gather(b_x, tl.minimum(o_l + BY, L - 1), 0))


@triton.jit
def _at(b_x, i, L: tl.constexpr):
    """b_x[i], in every lane."""
    return tl.gather(b_x, tl.zeros([L], tl.int32) + i, 0)


@triton.jit
def _two_on(b_x, b_arriving, b_following, S: tl.constexpr, L: tl.constexpr):
    """b_x [L] of the slot two places newer, when the first of b_arriving arrives."""
    b_last = tl.where(tl.arange(0, L) >= S - 1, _at(b_following, 0, L), _at(b_arriving, 0, L))
    return _shifted(b_x, b_last, 2, S, L)


@triton.jit
def _merge_by_mass(b_begin, b_sum, b_arriving, b_arriving_sum, n, S: tl.constexpr, L: tl.constexpr):
    """Take n arriving boundaries. sum: of a slot's scores, float32. Returns the list after, the pairs merged and the
    boundaries removed [L], and whether every choice is certain.

    The bits of a float32 that is not negative are ordered like the numbers, so that one minimum over bits whose low
    ones name the lane finds value and pair. A sum is of at most L + 1 rounded float32: its error is below L + 3 units
    of its last place, the lane's bits are less than L more. A choice is certain if no other sum lies within 8 L.
    """
    BITS: tl.constexpr = 5 if L == 32 else 6
    o_l = tl.arange(0, L)
    b_pair = tl.zeros([L], tl.int32)
    b_removed = tl.zeros([L], tl.int32)
    b_near = tl.zeros([L], tl.int32)
    for i in range(n):
        b_next = _shifted(b_begin, _at(b_arriving, i, L), 1, S, L)
        b_next_sum = _shifted(b_sum, _at(b_arriving_sum, i, L), 1, S, L)
        b_both = b_sum + b_next_sum
        b_key = ((b_both.to(tl.int32, bitcast=True) >> BITS) << BITS) + o_l
        b_key = tl.where(o_l < S - 1, b_key, 2**31 - 1)
        i_least = tl.min(b_key, 0)
        i_pair = i_least & (L - 1)
        b_near += ((b_key - i_least) < (8 << BITS)).to(tl.int32)
        b_pair = tl.where(o_l == i, i_pair, b_pair)
        b_removed = tl.where(o_l == i, _at(b_next, i_pair, L), b_removed)
        b_sum = tl.where(o_l < i_pair, b_sum, tl.where(o_l == i_pair, b_both, b_next_sum))
        b_begin = tl.where(o_l <= i_pair, b_begin, b_next)
    return b_begin, b_pair, b_removed, tl.sum(b_near, 0) == n


@triton.jit
def _density(b_sum, b_tokens):
    """2 + scores a token, at most 4: in [2, 4] a float32 counts 2^-22 ths. What is no number becomes a tie."""
    return tl.minimum(b_sum / b_tokens.to(tl.float32), 2.0) + 2.0


@triton.jit
def _merge_by_density(
    b_begin, b_sum, b_density, b_arriving, b_following, b_arriving_sum, b_arriving_density, n,
    S: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The same by density, each boundary followed by the one in b_following; scores lie in [0, 2].

    density: `_density` of a slot and the next one.

    Merging slots j and j + 1 changes the densities of the pairs j - 1 and j alone, and makes either a density of three
    slots in a row as they were. Those of all triples are made while the least pair is still looked for: one step waits
    for the other's minimum, not for its quotients.

    A sum is of at most L + 1 rounded float32; a density is two more sums, a quotient and the 2: its error is below
    (L + 3) 2^-23 + 2^-20. A choice is certain if no other density lies within 2 L 2^-22.
    """
    BITS: tl.constexpr = 5 if L == 32 else 6
    o_l = tl.arange(0, L)
    b_lane = o_l + tl.where(o_l < S - 1, 0, 2**30)
    b_pair = tl.zeros([L], tl.int32)
    b_removed = tl.zeros([L], tl.int32)
    b_near = tl.zeros([L], tl.int32)
    for i in range(n):
        b_new = _at(b_arriving, i, L)
        b_new_sum = _at(b_arriving_sum, i, L)
        b_next = _shifted(b_begin, b_new, 1, S, L)
        b_next_sum = _shifted(b_sum, b_new_sum, 1, S, L)
        b_next_density = _shifted(b_density, _at(b_arriving_density, i, L), 1, S, L)
        b_both = b_sum + b_next_sum
        b_third_end = tl.where(o_l == S - 3, b_new, _shifted(b_begin, _at(b_following, i, L), 3, S + 1, L))
        b_triple = _density(b_both + _shifted(b_sum, b_new_sum, 2, S, L), b_third_end - b_begin)
        b_key = (b_density.to(tl.int32, bitcast=True) << BITS) + b_lane
        i_least = tl.min(b_key, 0)
        i_pair = i_least & (L - 1)
        b_near += ((b_key - i_least) < (2 * L << BITS)).to(tl.int32)
        b_pair = tl.where(o_l == i, i_pair, b_pair)
        b_removed = tl.where(o_l == i, _at(b_next, i_pair, L), b_removed)
        b_sum = tl.where(o_l < i_pair, b_sum, tl.where(o_l == i_pair, b_both, b_next_sum))
        b_density = tl.where(o_l < i_pair - 1, b_density, tl.where(o_l <= i_pair, b_triple, b_next_density))
        b_begin = tl.where(o_l <= i_pair, b_begin, b_next)
    return b_begin, b_pair, b_removed, tl.sum(b_near, 0) == n


@triton.jit
def _merge_exactly(
    b_begin, b_prefix, b_arriving, b_arriving_prefix, n, RULE: tl.constexpr, S: tl.constexpr, L: tl.constexpr
):
    """By density or mass, from the sums of scores before each boundary, float64, ties to the oldest pair."""
    o_l = tl.arange(0, L)
    b_pair = tl.zeros([L], tl.int32)
    b_removed = tl.zeros([L], tl.int32)
    for i in range(n):
        b_new, b_new_prefix = _at(b_arriving, i, L), _at(b_arriving_prefix, i, L)
        b_next = _shifted(b_begin, b_new, 1, S, L)
        b_next_prefix = _shifted(b_prefix, b_new_prefix, 1, S, L)
        b_cost = _shifted(b_prefix, b_new_prefix, 2, S, L) - b_prefix
        if RULE == "density":
            b_cost = b_cost / (_shifted(b_begin, b_new, 2, S, L) - b_begin).to(tl.float64)
        b_cost = tl.where(o_l < S - 1, b_cost, float("inf"))
        i_pair = tl.min(tl.where(b_cost == tl.min(b_cost, 0), o_l, S - 2), 0)
        b_pair = tl.where(o_l == i, i_pair, b_pair)
        b_removed = tl.where(o_l == i, _at(b_next, i_pair, L), b_removed)
        b_prefix = tl.where(o_l <= i_pair, b_prefix, b_next_prefix)
        b_begin = tl.where(o_l <= i_pair, b_begin, b_next)
    return b_begin, b_pair, b_removed


@triton.jit
def _merge_at_random(b_begin, b_arriving, i_document, n, S: tl.constexpr, L: tl.constexpr):
    """The same for pairs that a hash of the arriving token's position names (`random_pair` of merging.py)."""
    o_l = tl.arange(0, L)
    b_hash = (b_arriving - i_document).to(tl.uint32) * 2654435761  # modulo 2^32
    b_pair = (b_hash >> 12).to(tl.int32) % (S - 1)
    b_removed = tl.zeros([L], tl.int32)
    for i in range(n):
        b_next = _shifted(b_begin, _at(b_arriving, i, L), 1, S, L)
        b_this = _at(b_pair, i, L)
        b_removed = tl.where(o_l == i, tl.gather(b_next, b_this, 0), b_removed)
        b_begin = tl.where(o_l <= b_this, b_begin, b_next)
    return b_begin, b_pair, b_removed


@triton.jit
def _prefix_of(p_prefix, p_carried_start, p_carried_prefix, i_fill, b_begin, L: tl.constexpr):
    """Sum of scores before each of these boundaries, float64."""
    b_prefix = tl.load(p_prefix + b_begin, mask=b_begin >= 0, other=0.0)
    if tl.min(b_begin, 0) < 0:
        for i in range(i_fill):
            m_here = b_begin == tl.load(p_carried_start + i)
            b_prefix = tl.where(m_here, tl.load(p_carried_prefix + i), b_prefix)
    return b_prefix


@triton.jit(do_not_specialize=["T", "lists", "pieces"])
def capacity_walk_kernel(
    p_position, p_document, p_prefix, p_carried_start, p_carried_prefix, p_carried_fill, p_count,
    p_death, p_merged, p_carried_death, T, lists, pieces,
    S: tl.constexpr, L: tl.constexpr, BX: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Walk every document that begins in one piece of BX tokens of one head: death, merged [B,H,T], carried_death."""
    i_piece = tl.program_id(0) // lists
    i_bh = (tl.program_id(0) % lists).to(tl.int64)
    o_l = tl.arange(0, L)
    p_position += i_bh * (S + T)
    p_document += i_bh * (S + T)
    p_prefix += i_bh * T
    p_carried_start += i_bh * S
    p_carried_prefix += i_bh * S
    p_carried_death += i_bh * S
    p_death += i_bh * T
    p_merged += i_bh * T
    p_count += i_bh * (1 + pieces)
    i_fill = tl.load(p_carried_fill + i_bh).to(tl.int32)
    i_total = tl.load(p_count + pieces)
    i_end = tl.load(p_count + i_piece + 1)
    i_at = tl.load(p_count + i_piece)
    if i_piece > 0:
        o_e = i_at + tl.arange(0, BX)
        b_here = tl.load(p_document + o_e, mask=o_e < i_end, other=_NO_DOCUMENT)
        b_before = tl.load(p_document + o_e - 1, mask=(o_e > 0) & (o_e < i_end), other=_NO_DOCUMENT)
        i_at = tl.min(tl.where(b_here != b_before, o_e, i_end), 0)
    while i_at < i_end:
        i_document = tl.load(p_document + i_at)
        o_e = i_at + o_l
        b_document = tl.load(p_document + o_e, mask=(o_e < i_total) & (o_l < S), other=_NO_DOCUMENT)
        m_live = b_document == i_document
        b_begin = tl.load(p_position + o_e, mask=m_live, other=-1)
        i_at += tl.sum(m_live.to(tl.int32), 0)
        n = tl.where(tl.sum(m_live.to(tl.int32), 0) == S, L, 0)
        while n == L:
            o_e = i_at + o_l
            b_document = tl.load(p_document + o_e, mask=o_e < i_total, other=_NO_DOCUMENT)
            n = tl.sum((b_document == i_document).to(tl.int32), 0)
            m_n = o_l < n
            b_arriving = tl.load(p_position + o_e, mask=m_n, other=0)
            if RULE == "oldest":
                b_removed = tl.load(p_position + o_e - (S - 1), mask=m_n, other=0)
                b_pair = tl.zeros([L], tl.int32)
            elif RULE == "random":
                b_begin, b_pair, b_removed = _merge_at_random(b_begin, b_arriving, i_document, n, S, L)
            else:
                b_following = tl.load(p_position + o_e + 1, mask=o_e + 1 < i_total, other=2**30)
                b_arriving_prefix = tl.load(p_prefix + b_arriving)
                b_following_prefix = tl.load(p_prefix + b_following, mask=o_e + 1 < i_total, other=0.0)
                b_live = tl.where(o_l < S, b_begin, 0)
                b_prefix = _prefix_of(p_prefix, p_carried_start, p_carried_prefix, i_fill, b_live, L)
                b_next_prefix = _shifted(b_prefix, _at(b_arriving_prefix, 0, L), 1, S, L)
                b_sum = tl.where(o_l < S, b_next_prefix - b_prefix, 0.0).to(tl.float32)
                b_arriving_sum = (b_following_prefix - b_arriving_prefix).to(tl.float32)
                if RULE == "mass":
                    b_walked, b_pair, b_removed, certain = _merge_by_mass(
                        b_begin, b_sum, b_arriving, b_arriving_sum, n, S, L
                    )
                else:
                    b_after = tl.load(p_position + o_e + 2, mask=o_e + 2 < i_total, other=2**30)
                    b_after_prefix = tl.load(p_prefix + b_after, mask=o_e + 2 < i_total, other=0.0)
                    b_walked, b_pair, b_removed, certain = _merge_by_density(
                        b_begin,
                        b_sum,
                        _density(
                            (_two_on(b_prefix, b_arriving_prefix, b_following_prefix, S, L) - b_prefix).to(tl.float32),
                            _two_on(b_begin, b_arriving, b_following, S, L) - b_begin,
                        ),
                        b_arriving,
                        b_following,
                        b_arriving_sum,
                        _density((b_after_prefix - b_arriving_prefix).to(tl.float32), b_after - b_arriving),
                        n,
                        S,
                        L,
                    )
                if not certain:
                    b_walked, b_pair, b_removed = _merge_exactly(
                        b_begin, b_prefix, b_arriving, b_arriving_prefix, n, RULE, S, L
                    )
                b_begin = b_walked
            tl.store(p_merged + b_arriving, b_pair.to(tl.int64), mask=m_n)
            tl.store(p_death + b_removed, b_arriving.to(tl.int64), mask=m_n & (b_removed >= 0))
            if tl.min(tl.where(m_n, b_removed, 0), 0) < 0:
                for i in range(i_fill):
                    m_here = m_n & (b_removed == tl.load(p_carried_start + i))
                    tl.store(p_carried_death + i + tl.zeros([L], tl.int32), b_arriving.to(tl.int64), mask=m_here)
            i_at += n


def capacity_merges_triton(
    boundary: Tensor,
    score: Tensor,
    document_start: Tensor,
    *,
    capacity: int,
    rule: str,
    carried_start: Tensor,
    carried_scores: Tensor,
    carried_fill: Tensor,
) -> Merges:
    """Deaths under `capacity` slots: boundary bool, score float32 [B,H,T], scores in [0, 2]; document_start [B,T];
    carried_start int64, carried_scores float64 [B,H,S], carried_fill int64 [B,H]. Never waits for the device.

    Raises ValueError for an unknown rule.
    """
    if rule not in CAPACITY_RULES:
        raise ValueError(f"capacity_rule={rule!r} is not one of {', '.join(CAPACITY_RULES)}")
    batch, heads, tokens = boundary.shape
    lists, device = batch * heads, boundary.device
    merges = Merges(
        death=torch.empty(batch, heads, tokens, dtype=torch.int64, device=device),
        carried_death=torch.empty(batch, heads, capacity, dtype=torch.int64, device=device),
        merged=torch.empty(batch, heads, tokens, dtype=torch.int64, device=device),
    )
    starts = document_start.to(torch.int32).contiguous()
    carried_start, carried_scores, carried_fill = (
        x.contiguous() for x in (carried_start, carried_scores.double(), carried_fill)
    )
    position = torch.empty(lists, capacity + tokens, dtype=torch.int32, device=device)
    document = torch.empty_like(position)
    prefix = torch.empty(lists, tokens, dtype=torch.float64, device=device)
    carried_prefix = torch.empty(lists, capacity, dtype=torch.float64, device=device)
    settings = tuning("boundary_lists", device)
    pieces = cdiv(tokens, settings["BX"])
    count = torch.empty(lists, 1 + pieces, dtype=torch.int32, device=device)
    results = (merges.death, merges.merged, merges.carried_death)
    launch(
        boundary_lists_kernel, (lists,),
        boundary.contiguous().view(torch.uint8), score.contiguous(), starts, carried_start, carried_scores,
        carried_fill, position, document, prefix, carried_prefix, count, *results, tokens, heads, pieces,
        S=capacity, BS=power_of_2(capacity), **settings,
    )  # fmt: skip
    if capacity > 1:
        launch(
            capacity_walk_kernel, (lists * pieces,),
            position, document, prefix, carried_start, carried_prefix, carried_fill, count, *results,
            tokens, lists, pieces,
            S=capacity, L=power_of_2(capacity, 32), BX=settings["BX"], RULE=rule, **tuning("capacity_walk", device),
        )  # fmt: skip
    return merges
