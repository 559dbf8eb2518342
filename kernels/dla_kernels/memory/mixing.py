"""Chunkwise multi-state mixing (design section 5): one algorithm for both backbones and every policy.

    o    = (M * W) V + sum_i w0_i (Q~ S_i)
    S'_j = sum_{i -> j} Gam S_i + K~_(l in j)^T V_(l in j)

W and w0 spread the read weights of recency ranks over tokens and old slots by the plan's indices. Everything inside chunks is
parallel over chunks; the S states pass from chunk to chunk. Differentiable in all real inputs through autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dla_kernels.backbones import gates_of
from dla_kernels.backbones.operators import ChunkOperators, apply_transition, chunk_operators
from dla_kernels.inputs import compute_dtype, heads_first, to_chunks
from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.slots import ChunkSlots, chunk_slots
from dla_kernels.plan import MemoryPlan


def mix_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, weights: Tensor, plan: MemoryPlan, *,
               frozen: bool, scale: float, cache: MergeCache | None, chunk: int) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, T, V] and final states [B, H, S, K, V] in the compute dtype; weights [B, H, T, S] by recency rank."""
    heads, dtype = v.shape[2], compute_dtype(q, k, v)

    def chunks(x: Tensor) -> Tensor:
        return to_chunks(heads_first(x, heads, dtype), chunk)

    erase, write = (None if gate is None else chunks(gate) for gate in gates_of(beta))
    boundary = to_chunks(plan.boundary.transpose(1, 2), chunk)
    operators = chunk_operators(chunks(q) * scale, chunks(k), chunks(log_decay), erase, write,
                                frozen_after=boundary if frozen else None)
    values, slots = chunks(v), chunk_slots(plan, chunk)
    by_rank = to_chunks(weights, chunk)
    weight_token = by_rank.gather(-1, slots.rank_token) * slots.reads_token
    weight_slot = by_rank.gather(-1, slots.rank_slot) * slots.reads_slot
    within = (operators.mixing * weight_token) @ values
    states = _initial_states(cache, v, k.shape[-1], plan.capacity, dtype)
    outputs = []
    for n in range(values.shape[2]):
        read, states = _chunk_step(states, operators, slots, weight_slot[:, :, n], values[:, :, n], n, frozen)
        outputs.append(within[:, :, n] + read)
    return torch.cat(outputs, dim=2)[:, :, : v.shape[1]], states


def _initial_states(cache: MergeCache | None, v: Tensor, key_dim: int, capacity: int, dtype: torch.dtype) -> Tensor:
    if cache is not None:
        return cache.states.to(dtype)
    batch, _, heads, value_dim = v.shape
    return torch.zeros(batch, heads, capacity, key_dim, value_dim, dtype=dtype, device=v.device)


def _chunk_step(states: Tensor, operators: ChunkOperators, slots: ChunkSlots, weight_slot: Tensor, values: Tensor, n: int,
                frozen: bool) -> tuple[Tensor, Tensor]:
    """Read the states [B,H,S,K,V] a chunk begins with, then carry them to its end: ([B,H,C,V], [B,H,S,K,V])."""
    capacity = states.shape[2]
    read = _read(operators.query_closed[:, :, n], weight_slot, states)
    carried = _at(operators.transition_closed, n)
    moved = apply_transition(carried, states)
    if frozen:
        newest = (slots.fill[:, :, n] - 1).clamp_min(0)[..., None]
        open_state = _take(states, newest)
        open_weight = weight_slot.gather(-1, newest[..., None].expand(*weight_slot.shape[:-1], 1))
        query = operators.query_open[:, :, n] - operators.query_closed[:, :, n]
        read = read + open_weight * (query @ open_state[:, :, 0])
        is_open = torch.nn.functional.one_hot(newest[..., 0], capacity).to(torch.bool)[..., None, None]
        moved = torch.where(is_open, apply_transition(_at(operators.transition_open, n), open_state), moved)
    joined = _one_hot(slots.end_of_slot[:, :, n], capacity, states.dtype)
    landed = _one_hot(slots.end_of_token[:, :, n], capacity, states.dtype)
    written = torch.einsum("bhls,bhlk,bhlv->bhskv", landed, operators.key_end[:, :, n], values)
    return read, (joined.transpose(-1, -2) @ moved.flatten(-2)).view_as(states) + written


def _read(query: Tensor, weight: Tensor, states: Tensor) -> Tensor:
    """sum_i weight_ti query_t^T S_i as one product over (slot, key): [B,H,C,K], [B,H,C,S], [B,H,S,K,V] -> [B,H,C,V]."""
    spread = (weight[..., :, None] * query[..., None, :]).flatten(-2)
    return spread @ states.flatten(2, 3)


def _at(matrix: Tensor | None, n: int) -> Tensor | None:
    return None if matrix is None else matrix[:, :, n]


def _take(states: Tensor, index: Tensor) -> Tensor:
    """states [B,H,S,K,V] at index [B,H,1] -> [B,H,1,K,V]."""
    return states.gather(2, index[..., None, None].expand(*index.shape, *states.shape[-2:]))


def _one_hot(index: Tensor, capacity: int, dtype: torch.dtype) -> Tensor:
    """One-hot over S slots; index S (dropped) gives a zero row."""
    return (index[..., None] == torch.arange(capacity, device=index.device)).to(dtype)
