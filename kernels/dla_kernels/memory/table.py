"""SlotTable: which slots are alive at every chunk edge, in 32 bits; all that the Triton kernels know of a plan.

Kernels derive the rest from it where they need it: the slot of a token or of an old slot at time t is the one whose
boundary is the latest alive at or before it, so ranks are counts of boundaries alive at t. No table of C x C is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dla_kernels.memory.slots import slot_values, slots_at_chunk_starts
from dla_kernels.plan import MemoryPlan

FAR = torch.iinfo(torch.int32).max
"""Start of an unused slot, and death of a boundary that lives on."""


@dataclass(frozen=True)
class SlotTable:
    """Slots alive at chunk edges; edge n lies before chunk n, edge N at the end of the row."""

    start: Tensor
    """[B, H, N+1, S] int32: first token of each slot, oldest first, counted from the row's first (negative: carried);
    FAR where unused."""
    death: Tensor
    """[B, H, N+1, S] int32: token at which its boundary is removed, that is where it joins its older neighbour (FAR:
    never in this row); -1 where unused."""
    fill: Tensor
    """[B, H, N+1] int32: slots alive."""
    token_death: Tensor
    """[B, H, T] int32: likewise for the boundary at each token; -1 where the token is no boundary."""
    document_start: Tensor
    """[B, T] int32: first token of each token's document (negative: before the row)."""
    chunk: int
    """C."""

    @property
    def capacity(self) -> int:
        """S."""
        return self.start.shape[-1]

    @property
    def chunks(self) -> int:
        """N."""
        return self.start.shape[2] - 1

    @property
    def tokens(self) -> int:
        """T, without padding."""
        return self.token_death.shape[-1]


def slot_table(plan: MemoryPlan, chunk: int) -> SlotTable:
    """The table of `plan` for chunks of `chunk` tokens; derived once and kept with the plan."""
    if chunk not in plan.table_by_chunk:
        if plan.boundary.device.type == "cpu":
            plan.table_by_chunk[chunk] = _derive(plan, chunk)
        else:
            from dla_kernels.memory.table_triton import slot_table_triton

            plan.table_by_chunk[chunk] = slot_table_triton(plan, chunk)
    return plan.table_by_chunk[chunk]


def _derive(plan: MemoryPlan, chunk: int) -> SlotTable:
    boundary, death = plan.boundary.transpose(1, 2), plan.death.transpose(1, 2)
    batch, heads, tokens = boundary.shape
    source = slots_at_chunk_starts(plan, boundary, death, chunk)
    used = source < plan.capacity + tokens
    index = torch.arange(tokens, device=boundary.device).expand(batch, heads, tokens)
    start = slot_values(index, plan.carried_start, source)
    ends = slot_values(death, plan.carried_death, source)
    return SlotTable(
        start=torch.where(used, start, FAR).to(torch.int32),
        death=torch.where(used, ends.clamp(max=FAR), -1).to(torch.int32),
        fill=used.sum(-1).to(torch.int32),
        token_death=torch.where(boundary, death.clamp(max=FAR), -1).to(torch.int32).contiguous(),
        document_start=plan.document_start.to(torch.int32).contiguous(),
        chunk=chunk,
    )
