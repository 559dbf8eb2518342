"""From a plan to per-chunk slot indices: what mixing, affinity and gates look things up in.

For every chunk of C tokens: the slots alive at its start, the recency rank under which each token reads every older
token and every old slot, and where old slots and tokens end up at the chunk's end. Integer data, no gradients; only
the short list of live slots is handed from chunk to chunk, everything else is parallel over chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dla_kernels.inputs import to_chunks
from dla_kernels.plan import NEVER, MemoryPlan


@dataclass(frozen=True)
class ChunkSlots:
    """Slot indices by chunk; i_t is the reading token, i_l a token of the same chunk, i_s a slot alive at its start."""

    source: Tensor
    """[B, H, N+1, S] int64: boundary of each slot alive at a chunk's start (last row: at the end of the sequence),
    oldest first, as an index into [carried slots, tokens]; unused slots hold S + T (a dummy that never lived)."""
    fill: Tensor
    """[B, H, N+1] int64: number of those slots."""
    rank_token: Tensor
    """[B, H, N, C, C] int64: recency rank, at i_t, of the slot holding i_l."""
    reads_token: Tensor
    """[B, 1, N, C, C] bool: i_l is at or before i_t and of its document."""
    rank_slot: Tensor
    """[B, H, N, C, S] int64: recency rank, at i_t, of the slot that i_s has become."""
    reads_slot: Tensor
    """[B, H, N, C, S] bool: i_s is used and of i_t's document."""
    end_of_slot: Tensor
    """[B, H, N, S] int64: index of i_s among the slots at the chunk's end; S where its document has ended."""
    end_of_token: Tensor
    """[B, H, N, C] int64: likewise for the chunk's tokens."""
    starts_here: Tensor
    """[B, H, N, C, C] bool: i_l is a boundary alive at i_t."""
    starts_before: Tensor
    """[B, H, N, C, S] bool: i_s has not joined an older slot by i_t, so that its boundary still starts a slot."""
    tokens: int
    """T, without padding."""

    def starts_by_rank(self, plan: MemoryPlan) -> tuple[Tensor, Tensor]:
        """First token (call-relative) and liveness of the slot of every recency rank: [B, H, T, S] int64 and bool."""
        values = torch.arange(self.tokens, device=self.source.device).expand(*plan.boundary.transpose(1, 2).shape)
        starts = self.boundary_values_by_rank(values, plan.carried_start, shift=0, fill=NEVER)
        return torch.where(starts == NEVER, 0, starts), starts != NEVER

    def boundary_values_by_rank(
        self, token_values: Tensor, carried_values: Tensor, *, shift: int, fill: float
    ) -> Tensor:
        """Spread a value per boundary to [B, H, T, S]: entry rank + shift of token t holds the value of that slot's
        boundary.

        token_values [B, H, T], carried_values [B, H, S]; entries no slot claims hold `fill`. Differentiable in both
        values.
        """
        batch, heads, chunks, size, capacity = self.rank_slot.shape
        dump = capacity + 1
        here = to_chunks(token_values, size)[..., None, :].expand(self.rank_token.shape)
        index = torch.where(self.starts_here, self.rank_token + shift, dump)
        out = token_values.new_full((batch, heads, chunks, size, dump + 1), fill).scatter(-1, index, here)
        old = slot_values(token_values, carried_values, self.source[:, :, :-1])[..., None, :].expand(
            self.rank_slot.shape
        )
        out = out.scatter(-1, torch.where(self.starts_before, self.rank_slot + shift, dump), old)
        return out.flatten(2, 3)[:, :, : self.tokens, :capacity]


def slot_values(token_values: Tensor, carried_values: Tensor, source: Tensor) -> Tensor:
    """Value of each slot's boundary: token_values [B,H,T], carried_values [B,H,S], source [B,H,N,S] -> [B,H,N,S].

    Unused slots hold 0.
    """
    table = torch.cat(
        [carried_values.to(token_values.dtype), token_values, torch.zeros_like(token_values[:, :, :1])], dim=-1
    )
    return table[:, :, None].expand(-1, -1, source.shape[2], -1).gather(-1, source)


def chunk_slots(plan: MemoryPlan, chunk: int) -> ChunkSlots:
    """Slot indices of `plan` for chunks of `chunk` tokens; derived once and kept with the plan."""
    if chunk not in plan.slots_by_chunk:
        plan.slots_by_chunk[chunk] = _derive(plan, chunk)
    return plan.slots_by_chunk[chunk]


def _derive(plan: MemoryPlan, chunk: int) -> ChunkSlots:
    boundary = plan.boundary.transpose(1, 2)
    death = plan.death.transpose(1, 2)
    batch, heads, tokens = boundary.shape
    source = slots_at_chunk_starts(plan, boundary, death, chunk)
    capacity = plan.capacity
    used = source < capacity + tokens
    fill = used.sum(-1)

    index = torch.arange(tokens, device=boundary.device)
    old_start = slot_values(index.expand(batch, heads, tokens), plan.carried_start, source)[:, :, :-1]
    old_death = slot_values(death, plan.carried_death, source)[:, :, :-1]
    old_used = used[:, :, :-1]

    chunks = source.shape[2] - 1
    time = torch.arange(chunks * chunk, device=boundary.device).view(1, 1, chunks, chunk)
    document = _pad_documents(plan.document_start, chunk)
    opens, dies = to_chunks(boundary, chunk), to_chunks(death, chunk)

    i_t, i_l = time[..., :, None], time[..., None, :]
    reads_token = (i_l <= i_t) & (i_l >= document[..., :, None])
    starts_here = opens[..., None, :] & reads_token & (dies[..., None, :] > i_t)
    opened = starts_here.cumsum(-1)
    newer_here = opened[..., -1:]
    rank_token = (newer_here - opened).clamp_(max=capacity - 1)

    reads_slot = old_used[..., None, :] & (old_start[..., None, :] >= document[..., :, None])
    alive = reads_slot & (old_death[..., None, :] > i_t)
    alive_so_far = alive.cumsum(-1)
    rank_slot = (newer_here + alive_so_far[..., -1:] - alive_so_far).clamp_(max=capacity - 1)

    # The chunk's last row of these tables is its end: padding holds no boundaries, so it holds for a short last
    # chunk too.
    end_of_slot = torch.where(reads_slot[..., -1, :], alive_so_far[..., -1, :] - 1, capacity)
    last = alive_so_far[..., -1, -1:] + opened[..., -1, :] - 1
    end_of_token = torch.where(reads_token[..., -1, :] & (time < tokens), last, capacity)
    return ChunkSlots(
        source,
        fill,
        rank_token,
        reads_token,
        rank_slot,
        reads_slot,
        end_of_slot,
        end_of_token,
        starts_here,
        alive,
        tokens,
    )


def _pad_documents(document_start: Tensor, chunk: int) -> Tensor:
    """[B, T] -> [B, 1, N, C]; padding continues the last document, so that the chunk's end sees it."""
    pad = -document_start.shape[1] % chunk
    padded = torch.cat([document_start, document_start[:, -1:].expand(-1, pad)], dim=1)
    return padded.unflatten(1, (-1, chunk))[:, None]


def slots_at_chunk_starts(plan: MemoryPlan, boundary: Tensor, death: Tensor, chunk: int) -> Tensor:
    """[B, H, N+1, S] into [carried slots, tokens, dummy]: boundaries alive before each chunk and at the end."""
    batch, heads, tokens = boundary.shape
    capacity, device = plan.capacity, boundary.device
    dummy = capacity + tokens
    index = torch.arange(tokens, device=device).expand(batch, heads, tokens)
    used = torch.arange(capacity, device=device) < plan.carried_fill[..., None]
    # (source, first token, death) of every candidate; what is no boundary is dead from the start
    of_tokens = torch.stack([index + capacity, index, torch.where(boundary, death, -1)])
    slot = torch.arange(capacity, device=device).expand(batch, heads, capacity)
    unused = torch.tensor([dummy, -NEVER, -1], device=device)[:, None, None, None]
    slots = torch.where(used, torch.stack([slot, plan.carried_start, plan.carried_death]), unused)
    empty = unused.expand(3, batch, heads, capacity + 1)
    rows, counts = [slots[0]], []
    for begin in range(0, tokens, chunk):
        end = min(begin + chunk, tokens)
        candidates = torch.cat([slots, of_tokens[..., begin:end]], dim=-1)
        alive = (candidates[2] >= end) & (candidates[1] >= plan.document_start[:, None, end - 1 : end])
        place = alive.cumsum(-1)
        counts.append(place[..., -1])
        place = torch.where(alive, place - 1, capacity).clamp_(max=capacity)
        slots = empty.scatter(-1, place.expand(candidates.shape), candidates)[..., :capacity]
        rows.append(slots[0])
    if bool((torch.stack(counts) > capacity).any()):
        raise ValueError(
            f"the plan keeps more than its capacity of {capacity} slots alive; its merges are inconsistent"
        )
    return torch.stack(rows, dim=2)
