"""MemoryPlan: which slot holds which token, when. The one interface between memory policies and kernels.

A plan is integer data without gradients. A *boundary* at token a opens a slot there; it *dies* at the token where a
merge removes it, that is where its slot joins the older neighbour. Boundaries with their deaths describe every policy
(`single`, `log_linear`, `fixed`, `dla`) and every capacity rule, so that nothing downstream knows a policy's name.
Forward decides once; backward and recomputation are given the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dla_kernels.memory.slots import ChunkSlots
    from dla_kernels.memory.table import SlotTable

NEVER = torch.iinfo(torch.int64).max
"""Death of a boundary that no merge of this call removes."""
NO_SLOT = torch.iinfo(torch.int32).min
"""Start of a slot that there is not, in `MemoryPlan.slots_at`."""


@dataclass(frozen=True)
class MemoryPlan:
    """Decisions for B sequences of T tokens and H heads (docs/dla.md sections 2 and 10)."""

    score: Tensor
    """[B, T, H] float32: drift I_t; 0 at a document's first token and under policies that do not score."""
    boundary: Tensor
    """[B, T, H] bool: the token opens a slot."""
    merged: Tensor
    """[B, T, H] int64: oldest-first index of the pair merged by capacity at this token, or -1. `log_linear`, whose
    carries merge several pairs at once, records -1: see `death`."""
    death: Tensor
    """[B, T, H] int64: token at which this token's boundary is removed, NEVER if in none of this call."""
    document_start: Tensor
    """[B, T] int64: first token of each token's document, as an index into its row (negative: before the row)."""
    capacity: int
    """S: most slots alive at once; the width of read weights."""
    chunk: int
    """C it was made for; operations on the plan use the same unless told otherwise, and share its slot indices."""
    carried_start: Tensor
    """[B, H, S] int64: first token of each slot in the carried cache (negative; unused slots 0), oldest first."""
    carried_death: Tensor
    """[B, H, S] int64: token at which the boundary of a carried slot is removed."""
    carried_fill: Tensor
    """[B, H] int64: slots in the carried cache."""
    score_gradients: tuple[Tensor, Tensor] | None = None
    """d I_t / d k_t [B, T, H, K] and d I_t / d v_t [B, T, H, V] at decided boundaries (0 elsewhere), where asked for:
    with the open state held constant, in the dtypes of k and v."""

    slots_by_chunk: dict[int, ChunkSlots] = field(default_factory=dict, repr=False, compare=False)
    """Slot indices already derived from this plan, by chunk size: affinity, gates and mixing share them."""
    table_by_chunk: dict[int, SlotTable] = field(default_factory=dict, repr=False, compare=False)
    """The same for the Triton kernels."""

    @property
    def positions(self) -> Tensor:
        """[B, T] int64: index of each token within its document, counting a carried cache."""
        return torch.arange(self.boundary.shape[1], device=self.boundary.device) - self.document_start

    @property
    def origin(self) -> Tensor:
        """[B, H] int64: tokens the carried slots hold; adding it counts tokens from the carried document's first."""
        return torch.where(self.carried_fill > 0, -self.carried_start[..., 0], 0)

    def slot_starts(self) -> Tensor:
        """[B, T, H, S] int64: first token of each live slot at each token, oldest first, -1 where unused.

        Tokens are counted from the row's first; with a carried cache, from the first token of the document it was in.
        """
        starts, live = self._slots().starts_by_rank(self)
        offset = self.origin
        chronological = torch.where(live, starts + offset[:, :, None, None], NEVER).sort(dim=-1).values
        return torch.where(chronological == NEVER, -1, chronological).transpose(1, 2)

    def slots_at(self, tokens: Tensor) -> Tensor:
        """[B, M, H, S] int32: first token of each live slot at the M `tokens` [M] of every row, by recency rank.

        Tokens are counted from the row's first, so that a carried slot's is negative; NO_SLOT where there is no slot.
        For a few tokens: the work is that of M x (S + C) boundaries, whatever T.
        """
        from dla_kernels.memory.table import slot_table

        table, end = slot_table(self, self.chunk), self.boundary.shape[1]
        edge = tokens // self.chunk
        inside = (edge * self.chunk)[:, None] + torch.arange(self.chunk, device=tokens.device)
        dies_inside = table.token_death[:, :, inside.clamp(max=end - 1)].where(inside < end, -1)
        dies = torch.cat([table.death[:, :, edge], dies_inside], dim=-1)
        begins = table.start[:, :, edge]
        begins = torch.cat([begins, inside.to(begins).expand(dies_inside.shape)], dim=-1)
        time, document = tokens[:, None], table.document_start[:, None, tokens, None]
        alive = (begins <= time) & (dies > time) & (begins >= document)
        newest_first = begins.where(alive, NO_SLOT).topk(self.capacity, dim=-1).values
        return newest_first.transpose(1, 2)

    def live_slots(self) -> Tensor:
        """[B, T, H] int64: number of live slots m at each token, after its boundary and merge."""
        opened = self.boundary.transpose(1, 2)
        batch, heads, tokens = opened.shape
        index = torch.arange(tokens, device=opened.device).expand(batch, heads, tokens)
        begin = torch.cat([self.carried_start, index], dim=-1)
        used = torch.arange(self.capacity, device=opened.device) < self.carried_fill[..., None]
        lives = torch.cat([used, opened], dim=-1)
        ends = torch.cat([self.carried_death, self.death.transpose(1, 2)], dim=-1).clamp(max=tokens)
        # A boundary whose document ends first does not die: its document's count ends.
        start = torch.nn.functional.pad(self.document_start, (0, 1))[:, None].expand(batch, heads, tokens + 1)
        dies = lives & (ends < tokens) & (start.gather(-1, ends) <= begin)
        died = ends.new_zeros(batch, heads, tokens + 1).scatter_add(-1, torch.where(dies, ends, tokens), dies.long())
        count = (opened.long() - died[..., :tokens]).cumsum(-1)
        start = start[..., :tokens]
        before = torch.where(start > 0, count.gather(-1, (start - 1).clamp_min(0)), 0)
        before = torch.where(start < 0, -self.carried_fill[..., None], before)
        return (count - before).transpose(1, 2)

    def _slots(self) -> ChunkSlots:
        from dla_kernels.memory.slots import chunk_slots

        return chunk_slots(self, self.chunk)
