"""The multi-state layer as one operation, dla_attention, and slot_affinity for its content reads (docs/dla.md, 10)."""

from __future__ import annotations

from torch import Tensor

from dla_kernels.inputs import check_inputs, compute_dtype, heads_first, to_chunks
from dla_kernels.launch import eager, mixing_chunk_size, resolve_backend
from dla_kernels.memory.affinity import carried_key_sums, chunk_affinity
from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.carry import final_cache
from dla_kernels.memory.gates import gate_read_weights
from dla_kernels.memory.mixing import mix_chunks
from dla_kernels.memory.reference import recurrent_affinity, recurrent_mix
from dla_kernels.memory.slots import chunk_slots
from dla_kernels.memory.table import slot_table
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

    q, k [B,T,Hk,K]; v [B,T,H,V]; log_decay (natural, finite, <= 0), beta [B,T,H] (None: mamba2); read_weights [B,T,H,S]
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
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    backend = resolve_backend(backend, q, k, v)
    chunk = chunk_size or mixing_chunk_size(plan.chunk, backend, q)
    frozen = closed_slots == "frozen"
    if backend == "triton":
        o, states = _mix_in_triton(
            q, k, v, log_decay, beta, read_weights, plan, gates, frozen=frozen, scale=scale, cache=cache, chunk=chunk
        )
    else:
        o, states = _mix_in_torch(
            q, k, v, log_decay, beta, read_weights, plan, gates,
            recurrent=backend == "recurrent", frozen=frozen, scale=scale, cache=cache, chunk=chunk,
        )  # fmt: skip
    if not return_cache:
        return o
    sums = None if routing_keys is None else _final_key_sums(routing_keys, plan, cache, chunk, backend)
    return o, final_cache(states, plan, slot_table(plan, chunk), gates, sums, cache)


def _mix_in_torch(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, weights: Tensor, plan: MemoryPlan,
    gates: Tensor | None, *, recurrent: bool, frozen: bool, scale: float, cache: MergeCache | None, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [B,T,H,V] in v's dtype, states [B,H,S,K,V])."""
    dtype = compute_dtype(q, k, v)
    weights = heads_first(weights, v.shape[2], dtype)
    if gates is not None:
        carried = None if cache is None else cache.gates
        weights = gate_read_weights(weights, gates.transpose(1, 2).to(dtype), plan, carried, chunk)
    if recurrent:
        o, states = recurrent_mix(q, k, v, log_decay, beta, weights, plan, frozen=frozen, scale=scale, cache=cache)
    else:
        o, states = mix_chunks(
            q, k, v, log_decay, beta, weights, plan, frozen=frozen, scale=scale, cache=cache, chunk=chunk
        )
    return o.transpose(1, 2).to(v.dtype), states


@eager
def _mix_in_triton(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, weights: Tensor, plan: MemoryPlan,
    gates: Tensor | None, *, frozen: bool, scale: float, cache: MergeCache | None, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `_mix_in_torch`; matrix products take operands of q's dtype."""
    from dla_kernels.backbones.operators_triton import chunk_operators_triton
    from dla_kernels.memory.gates_triton import gate_read_weights_triton
    from dla_kernels.memory.mixing_triton import mix_triton

    table = slot_table(plan, chunk)
    weights = weights.float()
    if gates is not None:
        weights = gate_read_weights_triton(weights, gates.float(), table, None if cache is None else cache.gates)
    operators = chunk_operators_triton(
        q, k.to(q.dtype), log_decay, beta, table.document_start,
        boundary=plan.boundary if frozen else None, scale=scale, chunk=chunk,
    )  # fmt: skip
    return mix_triton(None if cache is None else cache.states, operators, v, weights, table, key_dim=k.shape[-1])


def _final_key_sums(keys: Tensor, plan: MemoryPlan, cache: MergeCache | None, chunk: int, backend: str) -> Tensor:
    """Routing key sums [B, H, S, R] of the slots at the end of the row."""
    before = None if cache is None else cache.key_sums
    if backend == "triton":
        from dla_kernels.memory.affinity_triton import final_key_sums

        return final_key_sums(keys, slot_table(plan, chunk), before)
    chunks = to_chunks(heads_first(keys, plan.boundary.shape[2], compute_dtype(keys)), chunk)
    return carried_key_sums(chunks, chunk_slots(plan, chunk), plan.capacity, before)[:, :, -1]


def check_closed_slots(closed_slots: str) -> None:
    """Raises ValueError unless `closed_slots` is one of CLOSED_SLOTS."""
    if closed_slots not in CLOSED_SLOTS:
        raise ValueError(f"closed_slots={closed_slots!r} is not one of {', '.join(CLOSED_SLOTS)}")


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
    if cache is not None and cache.key_sums is None:
        raise ValueError("the cache holds no routing keys; make it with MergeCache.empty(..., routing_dim=R)")
    sums = None if cache is None else cache.key_sums
    backend = resolve_backend(backend, rho, kappa)
    chunk = chunk_size or mixing_chunk_size(plan.chunk, backend, rho)
    if backend == "triton":
        from dla_kernels.memory.affinity_triton import chunk_affinity_triton

        return chunk_affinity_triton(rho, kappa, slot_table(plan, chunk), sums)
    heads, dtype = plan.boundary.shape[2], compute_dtype(rho, kappa)
    rho, kappa = heads_first(rho, heads, dtype), heads_first(kappa, heads, dtype)
    if backend == "recurrent":
        return recurrent_affinity(rho, kappa, plan, sums).transpose(1, 2)
    return chunk_affinity(rho, kappa, plan, sums, chunk).transpose(1, 2)
