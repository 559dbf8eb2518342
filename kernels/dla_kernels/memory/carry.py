"""The MergeCache a call leaves behind: what its slots at the last token hold, told from their first tokens.

A slot is the stretch of tokens between its start and the next one's, so counts and score sums are differences of
positions and of prefix sums (float64, as in merging.py: ties then resolve alike in a continued call).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.table import SlotTable
from dla_kernels.plan import MemoryPlan


def final_cache(
    states: Tensor,
    plan: MemoryPlan,
    table: SlotTable,
    gates: Tensor | None,
    key_sums: Tensor | None,
    cache: MergeCache | None,
) -> MergeCache:
    """The cache after the last token, without a conv window.

    states [B,H,S,K,V] and key_sums [B,H,S,R] at the end of the row, gates [B,T,H] of boundaries (None: 1); `cache` is
    the one the row began with.
    """
    begin, end, used = _final_slots(table)
    tokens = table.tokens
    score = F.pad(plan.score.transpose(1, 2).double().cumsum(-1), (1, 0))
    scores = score.gather(-1, end.clamp_min(0)) - score.gather(-1, begin.clamp_min(0))
    dtype = states.dtype
    slot_gates = torch.ones_like(begin, dtype=dtype)
    if gates is not None:
        slot_gates = gates.transpose(1, 2).to(dtype).gather(-1, begin.clamp(0, tokens - 1))
    if cache is not None:
        started = plan.carried_start[..., None, :]
        carried = torch.arange(plan.capacity, device=begin.device) < plan.carried_fill[..., None, None]
        inside = carried & (started >= begin[..., None]) & (started < end[..., None])
        scores = scores + torch.where(inside, cache.scores[..., None, :], 0.0).sum(-1)
        first = carried & (started == begin[..., None])
        of_cache = torch.where(first, cache.gates[..., None, :].to(dtype), 0.0).sum(-1)
        slot_gates = torch.where(begin < 0, of_cache, slot_gates)
    return MergeCache(
        states=states,
        counts=end - begin,
        scores=scores,
        gates=torch.where(used, slot_gates, 1.0),
        fill=table.fill[:, :, -1].long(),
        position=plan.positions[:, -1] + 1,
        key_sums=key_sums,
        conv=None,
    )


def _final_slots(table: SlotTable) -> tuple[Tensor, Tensor, Tensor]:
    """First token and end [B, H, S] int64 of the slots at the end of the row, and which are used (others: T, T)."""
    used = torch.arange(table.capacity, device=table.start.device) < table.fill[:, :, -1, None]
    begin = torch.where(used, table.start[:, :, -1].long(), table.tokens)
    return begin, F.pad(begin[..., 1:], (0, 1), value=table.tokens), used
