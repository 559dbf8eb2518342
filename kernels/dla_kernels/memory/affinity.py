"""Slot affinity for content reading (docs/dla.md section 2.5): rho_t . (mean routing key of each live slot).

Sums of routing keys and token counts add under merges, so they pass from chunk to chunk like states do; inside a chunk
a C x C product is summed by recency rank. A mean, not a sum: long slots would otherwise drown short ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dla_kernels.inputs import to_chunks
from dla_kernels.memory.slots import ChunkSlots, chunk_slots, slot_values
from dla_kernels.plan import MemoryPlan


def chunk_affinity(rho: Tensor, kappa: Tensor, plan: MemoryPlan, key_sums: Tensor | None, chunk: int) -> Tensor:
    """[B,H,T,S] by recency rank, -inf where no slot; rho, kappa [B,H,T,R], key_sums [B,H,S,R] of a carried cache."""
    slots = chunk_slots(plan, chunk)
    queries, keys = to_chunks(rho, chunk), to_chunks(kappa, chunk)
    sums = carried_key_sums(keys, slots, plan.capacity, key_sums)[:, :, :-1]
    inside = (queries @ keys.transpose(-1, -2)) * slots.reads_token
    before = (queries @ sums.transpose(-1, -2)) * slots.reads_slot
    total = inside.new_zeros(*inside.shape[:-1], plan.capacity)
    total = total.scatter_add(-1, slots.rank_token, inside).scatter_add(-1, slots.rank_slot, before)
    count = _token_counts(plan, slots, total)
    mean = total / count.clamp_min(1)
    return mean.masked_fill(count == 0, float("-inf")).flatten(2, 3)[:, :, : slots.tokens]


def carried_key_sums(keys: Tensor, slots: ChunkSlots, capacity: int, key_sums: Tensor | None) -> Tensor:
    """Key sums of the slots at every chunk start and at the end: keys [B,H,N,C,R] -> [B,H,N+1,S,R]."""
    size = (*keys.shape[:2], capacity, keys.shape[-1])
    sums = keys.new_zeros(size) if key_sums is None else key_sums.to(keys.dtype)
    column = torch.arange(capacity, device=keys.device)
    rows = [sums]
    landed = (slots.end_of_token[..., None] == column).to(keys.dtype)
    joined = (slots.end_of_slot[..., None] == column).to(keys.dtype)
    for join, new in zip(joined.unbind(2), (landed.transpose(-1, -2) @ keys).unbind(2), strict=True):
        sums = join.transpose(-1, -2) @ sums + new
        rows.append(sums)
    return torch.stack(rows, dim=2)


def slot_counts(plan: MemoryPlan, slots: ChunkSlots) -> Tensor:
    """Tokens in each slot at every chunk start and at the end: [B, H, N+1, S] int64, 0 where unused."""
    batch, heads, rows, capacity = slots.source.shape
    tokens = slots.tokens
    index = torch.arange(tokens, device=slots.source.device).expand(batch, heads, tokens)
    size = slots.rank_token.shape[-1]
    now = (torch.arange(rows, device=index.device) * size).clamp(max=tokens)
    start = slot_values(index, plan.carried_start, slots.source)
    used = torch.arange(capacity, device=index.device) < slots.fill[..., None]
    start = torch.where(used, start, now[:, None])
    following = torch.cat([start[..., 1:], now[:, None].expand(batch, heads, rows, 1)], dim=-1)
    return following - start


def _token_counts(plan: MemoryPlan, slots: ChunkSlots, like: Tensor) -> Tensor:
    """Tokens of the slot of every recency rank at every token, in `like`'s shape [B,H,N,C,S] and dtype."""
    inside = slots.reads_token.expand(slots.rank_token.shape).to(like.dtype)
    before = slot_counts(plan, slots)[:, :, :-1, None, :] * slots.reads_slot
    count = torch.zeros_like(like).scatter_add(-1, slots.rank_token, inside)
    return count.scatter_add(-1, slots.rank_slot, before.to(like.dtype))
