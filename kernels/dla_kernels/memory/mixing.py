"""Chunkwise multi-state mixing (docs/dla.md section 5): one algorithm for both backbones and every policy.

    o    = (M * W) V + sum_i w0_i (Q~ S_i)
    S'_j = sum_{i -> j} Gam S_i + K~_(l in j)^T V_(l in j)

W and w0 spread the read weights of recency ranks over tokens and old slots by the plan's indices. Everything inside
chunks is parallel over chunks; the S states pass from chunk to chunk. Differentiable in all real inputs through
autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_kernels.backbones import gates_of
from dla_kernels.backbones.operators import ChunkOperators, apply_transition, chunk_operators
from dla_kernels.inputs import compute_dtype, heads_first, to_chunks
from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.slots import ChunkSlots, chunk_slots
from dla_kernels.plan import MemoryPlan


def mix_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    weights: Tensor,
    plan: MemoryPlan,
    *,
    frozen: bool,
    scale: float,
    cache: MergeCache | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, T, V] and final states [B, H, S, K, V] in the compute dtype; weights [B, H, T, S] by recency
    rank."""
    heads, dtype = v.shape[2], compute_dtype(q, k, v)

    def chunks(x: Tensor) -> Tensor:
        return to_chunks(heads_first(x, heads, dtype), chunk)

    erase, write = (None if gate is None else chunks(gate) for gate in gates_of(beta))
    boundary = to_chunks(plan.boundary.transpose(1, 2), chunk)
    values, slots = chunks(v), chunk_slots(plan, chunk)
    operators = chunk_operators(
        chunks(q) * scale,
        chunks(k),
        chunks(log_decay),
        erase,
        write,
        slots.reads_token,
        frozen_after=boundary if frozen else None,
    )
    by_rank = to_chunks(weights, chunk)
    weight_token = by_rank.gather(-1, slots.rank_token) * slots.reads_token
    weight_slot = by_rank.gather(-1, slots.rank_slot) * slots.reads_slot
    within = (operators.mixing * weight_token) @ values
    states = _initial_states(cache, v, k.shape[-1], plan.capacity, dtype)
    reads = []
    # Unbound once: slicing chunk by chunk would make backward write the whole tensor's gradient for every chunk.
    for step in zip(_per_chunk(operators, slots), weight_slot.unbind(2), values.unbind(2), strict=True):
        read, states = _chunk_step(states, *step, frozen=frozen)
        reads.append(read)
    o = within + torch.stack(reads, dim=2)
    return o.flatten(2, 3)[:, :, : v.shape[1]], states


@dataclass(frozen=True)
class _Chunk:
    """Operators and slot indices of one chunk, as in ChunkOperators and ChunkSlots without the chunk axis."""

    query_closed: Tensor
    query_open: Tensor
    key_end: Tensor
    transition_closed: Tensor | None
    transition_open: Tensor
    joined: Tensor
    """[B, H, S, S]: one-hot of where each slot at the start ends up; a zero row where it is dropped."""
    landed: Tensor
    """[B, H, C, S]: one-hot of the slot each token ends up in."""
    newest: Tensor
    """[B, H, 1] int64: the slot that is open when the chunk begins (0 where there is none)."""


def _per_chunk(operators: ChunkOperators, slots: ChunkSlots) -> list[_Chunk]:
    capacity, dtype = slots.source.shape[-1], operators.key_end.dtype
    chunks = operators.key_end.shape[2]
    closed = operators.transition_closed
    parts = zip(
        operators.query_closed.unbind(2),
        operators.query_open.unbind(2),
        operators.key_end.unbind(2),
        [None] * chunks if closed is None else closed.unbind(2),
        operators.transition_open.unbind(2),
        _one_hot(slots.end_of_slot, capacity, dtype).unbind(2),
        _one_hot(slots.end_of_token, capacity, dtype).unbind(2),
        (slots.fill[:, :, :-1] - 1).clamp_min(0)[..., None].unbind(2),
        strict=True,
    )
    return [_Chunk(*part) for part in parts]


def _initial_states(cache: MergeCache | None, v: Tensor, key_dim: int, capacity: int, dtype: torch.dtype) -> Tensor:
    if cache is not None:
        return cache.states.to(dtype)
    batch, _, heads, value_dim = v.shape
    return torch.zeros(batch, heads, capacity, key_dim, value_dim, dtype=dtype, device=v.device)


def _chunk_step(
    states: Tensor, chunk: _Chunk, weight_slot: Tensor, values: Tensor, *, frozen: bool
) -> tuple[Tensor, Tensor]:
    """Read the states [B,H,S,K,V] a chunk begins with, then carry them to its end: ([B,H,C,V], [B,H,S,K,V])."""
    read = _read(chunk.query_closed, weight_slot, states)
    moved = apply_transition(chunk.transition_closed, states)
    if frozen:
        open_state = states.gather(2, chunk.newest[..., None, None].expand(-1, -1, 1, *states.shape[3:]))
        open_weight = weight_slot.gather(-1, chunk.newest[..., None].expand(*weight_slot.shape[:-1], 1))
        read = read + open_weight * ((chunk.query_open - chunk.query_closed) @ open_state[:, :, 0])
        is_open = F.one_hot(chunk.newest[..., 0], states.shape[2]).to(torch.bool)[..., None, None]
        moved = torch.where(is_open, apply_transition(chunk.transition_open, open_state), moved)
    keys = (chunk.landed[..., :, None] * chunk.key_end[..., None, :]).flatten(-2)
    written = keys.transpose(-1, -2) @ values
    return read, (chunk.joined.transpose(-1, -2) @ moved.flatten(-2) + written.view(*moved.shape[:3], -1)).view_as(
        states
    )


def _read(query: Tensor, weight: Tensor, states: Tensor) -> Tensor:
    """sum_i weight_ti query_t^T S_i as one product over (slot, key): [B,H,C,K], [B,H,C,S], [B,H,S,K,V] -> [B,H,C,V]."""
    spread = (weight[..., :, None] * query[..., None, :]).flatten(-2)
    return spread @ states.flatten(2, 3)


def _one_hot(index: Tensor, capacity: int, dtype: torch.dtype) -> Tensor:
    """One-hot over S slots; index S (dropped) gives a zero row."""
    return (index[..., None] == torch.arange(capacity, device=index.device)).to(dtype)
