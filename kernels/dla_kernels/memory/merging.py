"""Capacity: which boundaries die, and when (docs/dla.md section 2.3).

The walk needs the scores alone, no state. A slot is the stretch between two live boundaries, so its token count and
its score sum are differences of positions and of prefix sums, and merging the pair (i, i+1) is removing boundary i+1
from a list of at most K. All (sequence, head, document) lists are walked in lockstep, one boundary of each at a time.
Prefix sums and densities are float64: sums of equal float32 scores are exact there, so that ties fall to the oldest
pair in every implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_kernels.plan import NEVER

CAPACITY_RULES = ("density", "mass", "oldest", "random")
"""Which adjacent pair a full memory merges: with the least score a token (the paper's), with the least sum of scores,
the oldest, or a random one."""


@dataclass(frozen=True)
class Merges:
    """When boundaries die, as in MemoryPlan but heads first."""

    death: Tensor
    """[B, H, T] int64."""
    carried_death: Tensor
    """[B, H, S] int64."""
    merged: Tensor
    """[B, H, T] int64."""


def random_pair(position: Tensor, pairs: int) -> Tensor:
    """The pair that rule `random` merges at a token: a hash of its position, so that a step or a replay agrees."""
    return ((position * 2654435761) % 4294967296 >> 12) % pairs


def capacity_merges(
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
    """Deaths under `capacity` slots: boundary, score [B, H, T]; carried_* [B, H, S], carried_fill [B, H]."""
    if rule not in CAPACITY_RULES:
        raise ValueError(f"capacity_rule={rule!r} is not one of {', '.join(CAPACITY_RULES)}")
    batch, heads, tokens = boundary.shape
    device = boundary.device
    used = torch.arange(capacity, device=device) < carried_fill[..., None]
    events = torch.cat([used, boundary], dim=-1)
    index = torch.arange(tokens, device=device).expand(batch, heads, tokens)
    position = torch.cat([carried_start, index], dim=-1)
    before = -torch.where(used, carried_scores, 0.0).flip(-1).cumsum(-1).flip(-1)
    score = score.double()
    prefix = torch.cat([before, score.cumsum(-1) - score], dim=-1)
    first = document_start[:, None, :1].expand(batch, heads, capacity)
    document = torch.cat([first, document_start[:, None].expand(batch, heads, tokens)], dim=-1)

    death = torch.full_like(position, NEVER)
    merged = torch.full_like(position, -1)
    lists = _long_lists(events, document, capacity)
    if lists is not None:
        _walk(lists, position, prefix, position - document, capacity, rule, death, merged)
    return Merges(death[..., capacity:], death[..., :capacity], merged[..., capacity:])


def _long_lists(events: Tensor, document: Tensor, capacity: int) -> Tensor | None:
    """Boundaries of each (sequence, head, document) with over `capacity`: [lists, most] flat indices, -1 padded."""
    flat = events.flatten().nonzero()[:, 0]
    if flat.numel() <= capacity:
        return None
    row = flat // events.shape[-1]
    start = document.flatten()[flat]
    new = torch.ones_like(flat, dtype=torch.bool)
    new[1:] = (row[1:] != row[:-1]) | (start[1:] != start[:-1])
    group = new.cumsum(0) - 1
    count = group.bincount()
    long = count > capacity
    if not bool(long.any()):
        return None
    within = torch.arange(flat.numel(), device=flat.device) - new.nonzero()[:, 0][group]
    keep = long[group]
    lists = flat.new_full((int(long.sum()), int(count.max())), -1)
    lists[(long.cumsum(0) - 1)[group[keep]], within[keep]] = flat[keep]
    return lists


def _rows(*tensors: Tensor, block: int = 256) -> Iterator[tuple[Tensor, ...]]:
    """Rows of several tensors side by side, as views made a block at a time: indexing one by one is slower, and as many
    views as there are boundaries keep Python's garbage collector busy."""
    for parts in zip(*(tensor.split(block) for tensor in tensors), strict=True):
        yield from zip(*(part.unbind(0) for part in parts), strict=True)


class _Alive:
    """Views of a buffer [3, lists, K + 1]: position, prefix sum, label of the boundaries alive and the arriving one."""

    def __init__(self, buffer: Tensor) -> None:
        self.slots, self.shifted, self.newest = buffer[..., :-1], buffer[..., 1:], buffer[..., -1]
        self.begins, self.ends, self.labels = buffer[:2, :, :-2], buffer[:2, :, 2:], buffer[2, :, :-1]


def _walk(
    lists: Tensor,
    position: Tensor,
    prefix: Tensor,
    in_document: Tensor,
    capacity: int,
    rule: str,
    death: Tensor,
    merged: Tensor,
) -> None:
    """Append each list's boundaries in turn, removing one whenever `capacity` are alive; fills death and merged."""
    pad = lists < 0
    source = lists.clamp_min(0)
    rows, most = lists.shape
    # A list that has ended walks on through far positions, whose removals are dropped below.
    beyond = torch.arange(most, device=lists.device, dtype=torch.float64) * 2.0**40
    at = torch.where(pad, beyond, position.flatten()[source].double())
    sums = torch.where(pad, 0.0, prefix.flatten()[source])
    label = torch.arange(most, device=lists.device, dtype=torch.float64).expand(rows, most)
    entries = torch.stack([at, sums, label])
    seen = in_document.flatten()[source][:, capacity:].T
    pairs = torch.zeros(most - capacity, rows, dtype=torch.int64, device=lists.device)
    label_sums = torch.empty(most - capacity, rows, dtype=torch.float64, device=lists.device)
    older = torch.ones(capacity - 1, capacity, dtype=torch.bool, device=lists.device).tril()  # kept in place by a merge
    # With lists this short a step costs what its calls cost: views are made once, results go into the other buffer.
    now, after = (
        _Alive(torch.empty_like(entries[..., : capacity + 1])),
        _Alive(torch.empty_like(entries[..., : capacity + 1])),
    )
    now.slots.copy_(entries[..., :capacity])
    gap, density = torch.empty_like(now.begins), torch.empty_like(now.begins[0])
    token_gap, score_gap = gap
    arriving_entries = entries[..., capacity:].permute(2, 0, 1).contiguous()
    for entry, pair, label_sum, position_seen in _rows(arriving_entries, pairs, label_sums, seen):
        now.newest.copy_(entry)
        if rule in ("density", "mass"):
            torch.sub(now.ends, now.begins, out=gap)
            if rule == "density":
                torch.div(score_gap, token_gap, out=density)
            torch.argmin(density if rule == "density" else score_gap, dim=-1, out=pair)
        elif rule == "random":
            pair.copy_(random_pair(position_seen, capacity - 1))
        torch.where(older.index_select(0, pair), now.slots, now.shifted, out=after.slots)
        torch.sum(after.labels, dim=-1, out=label_sum)
        now, after = after, now
    # Labels are whole numbers: what a step's sum lacks of the sum before and the label that arrived is the one removed.
    before = torch.cat([label[:, :capacity].sum(-1)[None], label_sums[:-1]])
    leaves = (before + label[:, capacity:].T - label_sums).long().T
    happened = ~pad[:, capacity:].T
    arriving = source[:, capacity:].T[happened]
    leaving = source.gather(1, leaves).T[happened]
    death.view(-1)[leaving] = position.flatten()[arriving]
    merged.view(-1)[arriving] = pairs[happened]
