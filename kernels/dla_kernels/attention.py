"""The multi-state layer as one operation, dla_attention, and slot_affinity for its content reads (docs/dla.md, 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from dla_kernels.inputs import check_inputs, compute_dtype, heads_first, to_chunks
from dla_kernels.launch import resolve_backend
from dla_kernels.memory.affinity import carried_key_sums, chunk_affinity, slot_counts
from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.gates import gate_read_weights
from dla_kernels.memory.mixing import mix_chunks
from dla_kernels.memory.reference import recurrent_affinity, recurrent_mix
from dla_kernels.memory.slots import ChunkSlots, chunk_slots, slot_values
from dla_kernels.plan import MemoryPlan

CLOSED_SLOTS = ("transition", "frozen")


def dla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None = None,
    *,
    read_weights: Tensor,
    plan: MemoryPlan,
    closed_slots: str = "transition",
    scale: float | None = None,
    gates: Tensor | None = None,
    routing_keys: Tensor | None = None,
    cache: MergeCache | None = None,
    return_cache: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, MergeCache]:
    """o_t = scale * sum_r w_(t,r) q_t^T S_r(t) over the live slots of `plan` (arXiv 2606.10650; docs/dla.md sections 2
    and 5).

    q, k [B,T,Hk,K]; v [B,T,H,V]; log_decay (natural log, <= 0) and beta [B,T,H] (None: mamba2); read_weights [B,T,H,S]
    by recency rank, S = plan.capacity; gates [B,T,H] from `boundary_gate` (None: hard); scale defaults to K**-0.5.
    Returns o [B,T,H,V] in v's dtype, and with return_cache the MergeCache after the last token, which needs
    routing_keys [B,T,Hk or H,R] where memory is read by content. Differentiable in every real input, the cache's
    states included. States are float32 (float64 for float64 inputs). Raises ValueError on shapes or names that do not
    fit.
    """
    check_inputs(k, v, log_decay, beta, q)
    batch, tokens, heads, _ = v.shape
    if read_weights.shape != (batch, tokens, heads, plan.capacity):
        raise ValueError(
            f"read_weights {tuple(read_weights.shape)} must be [B, T, H, S] = "
            f"{(batch, tokens, heads, plan.capacity)}, S being the plan's capacity"
        )
    if plan.boundary.shape != (batch, tokens, heads):
        raise ValueError(
            f"the plan is for [B, T, H] = {tuple(plan.boundary.shape)}, the inputs are {(batch, tokens, heads)}"
        )
    check_closed_slots(closed_slots)
    chunk = chunk_size or plan.chunk
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    frozen, dtype = closed_slots == "frozen", compute_dtype(q, k, v)
    weights = heads_first(read_weights, heads, dtype)
    gate = None if gates is None else gates.transpose(1, 2).to(dtype)
    if gate is not None:
        weights = gate_read_weights(weights, gate, plan, None if cache is None else cache.gates, chunk)
    if resolve_backend(backend, q, k, v) == "recurrent":
        o, states = recurrent_mix(q, k, v, log_decay, beta, weights, plan, frozen=frozen, scale=scale, cache=cache)
    else:
        o, states = mix_chunks(
            q, k, v, log_decay, beta, weights, plan, frozen=frozen, scale=scale, cache=cache, chunk=chunk
        )
    o = o.transpose(1, 2).to(v.dtype)
    if not return_cache:
        return o
    keys = None if routing_keys is None else heads_first(routing_keys, heads, dtype)
    return o, _final_cache(states, plan, gate, keys, cache, chunk)


def check_closed_slots(closed_slots: str) -> None:
    """Raises ValueError unless `closed_slots` is one of CLOSED_SLOTS."""
    if closed_slots not in CLOSED_SLOTS:
        raise ValueError(f"closed_slots={closed_slots!r} is not one of {', '.join(CLOSED_SLOTS)}")


def _final_cache(
    states: Tensor,
    plan: MemoryPlan,
    gates: Tensor | None,
    routing_keys: Tensor | None,
    cache: MergeCache | None,
    chunk: int,
) -> MergeCache:
    slots = chunk_slots(plan, chunk)
    source, ones = slots.source[:, :, -1:], torch.ones_like(states[..., 0, 0])
    used = torch.arange(plan.capacity, device=states.device) < slots.fill[:, :, -1:]
    token_gates = torch.ones_like(plan.score.transpose(1, 2)).to(states.dtype) if gates is None else gates
    carried_gates = ones if cache is None else cache.gates.to(states.dtype)
    key_sums = None
    if routing_keys is not None:
        before = None if cache is None else cache.key_sums
        key_sums = carried_key_sums(to_chunks(routing_keys, chunk), slots, plan.capacity, before)[:, :, -1]
    return MergeCache(
        states=states,
        counts=slot_counts(plan, slots)[:, :, -1],
        scores=_final_scores(plan, slots, cache),
        gates=torch.where(used, slot_values(token_gates, carried_gates, source)[:, :, 0], ones),
        fill=slots.fill[:, :, -1],
        position=plan.positions[:, -1] + 1,
        key_sums=key_sums,
        conv=None,
    )


def _final_scores(plan: MemoryPlan, slots: ChunkSlots, cache: MergeCache | None) -> Tensor:
    """Score sums of the final slots [B, H, S] float64, by the carry that states take."""
    score = to_chunks(plan.score.transpose(1, 2).double()[..., None], slots.rank_token.shape[-1])
    before = None if cache is None else cache.scores[..., None]
    return carried_key_sums(score, slots, plan.capacity, before)[:, :, -1, :, 0]


def slot_affinity(
    rho: Tensor,
    kappa: Tensor,
    plan: MemoryPlan,
    *,
    cache: MergeCache | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """rho_t . (mean of kappa over each live slot, token t included): [B,T,H,S] by recency rank, -inf where no slot.

    rho, kappa [B,T,Hk or H,R]. With `cache`, its key_sums count. Differentiable in rho and kappa. Source: docs/dla.md
    2.5.
    """
    heads, dtype = plan.boundary.shape[2], compute_dtype(rho, kappa)
    if cache is not None and cache.key_sums is None:
        raise ValueError("the cache holds no routing keys; make it with MergeCache.empty(..., routing_dim=R)")
    sums = None if cache is None else cache.key_sums
    rho, kappa = heads_first(rho, heads, dtype), heads_first(kappa, heads, dtype)
    if resolve_backend(backend, rho, kappa) == "recurrent":
        return recurrent_affinity(rho, kappa, plan, sums).transpose(1, 2)
    return chunk_affinity(rho, kappa, plan, sums, chunk_size or plan.chunk).transpose(1, 2)
