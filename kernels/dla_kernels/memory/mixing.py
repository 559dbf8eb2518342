"""Chunkwise multi-state mixing (docs/dla.md section 5): one algorithm for both backbones and every policy.

    o    = (M * W) V + sum_i w0_i (Q~ S_i)
    S'_j = sum_{i -> j} Gam S_i + K~_(l in j)^T V_(l in j)

W and w0 spread the read weights of recency ranks over tokens and old slots by the plan's indices. Everything inside
chunks is parallel over chunks; the S states pass from chunk to chunk (scan.py). Differentiable in all real inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dla_kernels.backbones.operators import ChunkOperators, chunk_operators
from dla_kernels.inputs import compute_dtype, heads_first, to_chunks
from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.scan import scan_states
from dla_kernels.memory.slots import chunk_slots
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
    """Outputs [B,H,T,V] and final states [B,H,S,K,V] in the compute dtype; weights [B,H,T,S] by recency rank."""
    heads, dtype = v.shape[2], compute_dtype(q, k, v)

    def chunks(x: Tensor) -> Tensor:
        return to_chunks(heads_first(x, heads, dtype), chunk)

    boundary = to_chunks(plan.boundary.transpose(1, 2), chunk)
    operators = chunk_operators(
        chunks(q) * scale,
        chunks(k),
        chunks(log_decay),
        None if beta is None else chunks(beta),
        chunk_slots(plan, chunk).reads_token,
        frozen_after=boundary if frozen else None,
    )
    initial = _initial_states(cache, v, k.shape[-1], plan.capacity, dtype)
    return mix_operators(initial, operators, chunks(v), weights, plan, chunk=chunk, frozen=frozen)


def mix_operators(
    initial: Tensor,
    operators: ChunkOperators,
    values: Tensor,
    weights: Tensor,
    plan: MemoryPlan,
    *,
    chunk: int,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    """`mix_chunks` from the operators on: initial [B,H,S,K,V], values [B,H,N,C,V], weights [B,H,T,S]."""
    slots = chunk_slots(plan, chunk)
    by_rank = to_chunks(weights, chunk)
    weight_token = by_rank.gather(-1, slots.rank_token) * slots.reads_token
    weight_slot = by_rank.gather(-1, slots.rank_slot) * slots.reads_slot
    within = (operators.mixing * weight_token) @ values
    reads, states = scan_states(initial, operators, slots, weight_slot, values, frozen=frozen)
    return (within + reads).flatten(2, 3)[:, :, : slots.tokens], states


def _initial_states(cache: MergeCache | None, v: Tensor, key_dim: int, capacity: int, dtype: torch.dtype) -> Tensor:
    if cache is not None:
        return cache.states.to(dtype)
    batch, _, heads, value_dim = v.shape
    return torch.zeros(batch, heads, capacity, key_dim, value_dim, dtype=dtype, device=v.device)
