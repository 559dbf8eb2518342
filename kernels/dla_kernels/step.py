"""dla_step: one token on the fixed-size cache (docs/dla.md sections 2 and 7), batched over sequences at different fill.

The same rules as the token loop, decided from the cache alone and written back in place. Boundaries are hard: this is
inference. The kernels are in step_triton.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dla_kernels.attention import check_closed_slots
from dla_kernels.backbones.recurrence import transition, write_of
from dla_kernels.launch import resolve_backend
from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.gates import content_read_weights
from dla_kernels.memory.merging import random_pair
from dla_kernels.memory.reference import token_score
from dla_kernels.planner import check_choices


@torch.no_grad()
def dla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None = None,
    *,
    read_weights: Tensor,
    tau: Tensor | float,
    cache: MergeCache,
    policy: str = "dla",
    drift: str = "token",
    capacity_rule: str = "density",
    interval: int = 64,
    closed_slots: str = "transition",
    scale: float | None = None,
    rho: Tensor | None = None,
    kappa: Tensor | None = None,
    gain: Tensor | None = None,
    sharpness: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token per sequence: q, k [B,Hk,K], v [B,H,V], log_decay, beta [B,H] -> o [B,H,V] in v's dtype; updates
    `cache` in place.

    read_weights [B,H,S] is the slot form by recency rank; with rho, kappa [B,Hk or H,R], gain and sharpness [H]
    content reading is added once the token is written. Options as in plan_memory and dla_attention; `torch` and
    `recurrent` are one code here. Raises ValueError on names that do not fit (in Triton on shapes too), before anything
    changes. A full log_linear cache raises too, but not in Triton, which cannot look: its two oldest slots join there.
    """
    check_choices(policy, drift, capacity_rule, cache.slots, interval)
    check_closed_slots(closed_slots)
    routing = _routing(cache, rho, kappa, gain, sharpness)
    if resolve_backend(backend, v, q, k, cache.states) == "triton":
        from dla_kernels.step_triton import StepOptions, step

        options = StepOptions(
            tau,
            policy,
            drift,
            capacity_rule,
            interval,
            closed_slots == "frozen",
            k.shape[-1] ** -0.5 if scale is None else scale,
        )
        o: Tensor = step(q, k, v, log_decay, beta, read_weights, cache, options, routing)
        return o
    heads = v.shape[1]
    dtype = cache.states.dtype
    q, k = (x.repeat_interleave(heads // x.shape[1], dim=1).to(dtype) for x in (q, k))
    value, log_decay = v.to(dtype), log_decay.to(dtype)
    beta = None if beta is None else beta.to(dtype)
    newest = (cache.fill - 1).clamp_min(0)
    open_state = _at_slot(cache.states, newest)
    score = torch.zeros_like(cache.fill, dtype=torch.float32)
    first = (cache.position == 0)[:, None].expand_as(score)
    if policy == "dla" and cache.slots > 1:
        score = token_score(k, value, log_decay, beta, open_state, drift).float().masked_fill(first, 0.0)
    boundary = first | _opens(policy, score, tau, cache, interval)
    _make_room(cache, boundary, policy, capacity_rule)

    newest = cache.fill - 1
    is_open = torch.arange(cache.slots, device=v.device) == newest[..., None]
    moved = transition(cache.states, k, log_decay, beta)
    if closed_slots == "frozen":
        moved = torch.where(is_open[..., None, None], moved, cache.states)
    cache.states.copy_(moved + is_open[..., None, None] * write_of(k, value, beta)[:, :, None])
    cache.counts += is_open
    cache.scores += is_open * score.double()[..., None]
    cache.position += 1
    weights = read_weights.to(dtype)
    rank = newest[..., None] - torch.arange(cache.slots, device=v.device)
    if routing is not None:
        weights = _content_weights(weights, cache, is_open, rank, routing)
    read = torch.where(rank >= 0, weights.gather(-1, rank.clamp_min(0)), 0.0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (scale * torch.einsum("bhs,bhk,bhskv->bhv", read, q, cache.states)).to(v.dtype)


_Routing = tuple[Tensor, Tensor, Tensor, Tensor]
"""rho, kappa [B, Hk or H, R], gain and sharpness [H]."""


def _routing(
    cache: MergeCache, rho: Tensor | None, kappa: Tensor | None, gain: Tensor | None, sharpness: Tensor | None
) -> _Routing | None:
    """What content reading needs, None without it; raises ValueError where a part is missing."""
    if rho is None and kappa is None:
        return None
    if rho is None or kappa is None or gain is None or sharpness is None:
        raise ValueError("content reading needs all of rho, kappa, gain and sharpness; give them all or none")
    if cache.key_sums is None:
        raise ValueError("the cache holds no routing keys; make it with MergeCache.empty(..., routing_dim=R)")
    return rho, kappa, gain, sharpness


def _content_weights(weights: Tensor, cache: MergeCache, is_open: Tensor, rank: Tensor, routing: _Routing) -> Tensor:
    """Add this token's routing key to the open slot (in place), then content reading to the slot form [B, H, S]."""
    rho, kappa, gain, sharpness = routing
    assert cache.key_sums is not None
    heads, dtype = weights.shape[1], weights.dtype
    keys = kappa.repeat_interleave(heads // kappa.shape[1], dim=1).to(dtype)
    cache.key_sums += is_open[..., None] * keys[:, :, None]
    query = rho.repeat_interleave(heads // rho.shape[1], dim=1).to(dtype)
    match = (cache.key_sums @ query[..., None])[..., 0] / cache.counts.clamp_min(1)
    return content_read_weights(weights, _by_rank(match, rank), gain=gain, sharpness=sharpness)


def _opens(policy: str, score: Tensor, tau: Tensor | float, cache: MergeCache, interval: int) -> Tensor:
    position = cache.position[:, None].expand_as(score)
    if policy == "dla" and cache.slots > 1:
        return score >= tau
    if policy == "fixed" and cache.slots > 1:
        return position % interval == 0
    if policy == "log_linear" and cache.slots > 1:
        if int(position.max()) >= 2 ** (cache.slots - 1):
            raise ValueError(
                f"a log_linear cache of {cache.slots} slots holds {2 ** (cache.slots - 1)} tokens; it is full"
            )
        return torch.ones_like(score, dtype=torch.bool)
    return torch.zeros_like(score, dtype=torch.bool)


def _make_room(cache: MergeCache, boundary: Tensor, policy: str, rule: str) -> None:
    """Merge what the policy merges at this token, then append an empty slot where there is a boundary; in place."""
    slot = torch.arange(cache.slots, device=boundary.device).expand_as(cache.counts)
    if policy == "log_linear":
        # Slots whose level carries: all inside the lowest set bit of the position join the slot that begins there.
        position = cache.position[:, None, None]
        starts = torch.where(slot < cache.fill[..., None], position + cache.slot_starts(), -1)
        keeps = (slot == 0) | (starts + (starts & -starts) > position)
        target = (keeps & (slot < cache.fill[..., None])).cumsum(-1) - 1
    else:
        full = boundary & (cache.fill == cache.slots)
        pair = _pair_to_merge(cache, rule, policy)
        target = torch.where(full[..., None] & (slot > pair[..., None]), slot - 1, slot)
    target = torch.where(slot < cache.fill[..., None], target, cache.slots - 1)
    joined = torch.nn.functional.one_hot(target, cache.slots) * (slot < cache.fill[..., None])[..., None]
    fill = torch.where(cache.fill > 0, target.gather(-1, (cache.fill - 1).clamp_min(0)[..., None])[..., 0] + 1, 0)
    for tensor in (cache.counts, cache.scores, cache.states, cache.key_sums):
        if tensor is not None:
            spread = (
                joined.transpose(-1, -2).to(tensor.dtype) @ tensor.flatten(3)
                if tensor.dim() > 3
                else (joined.to(tensor.dtype) * tensor[..., None]).sum(-2)
            )
            tensor.copy_(spread.view_as(tensor))
    survivor = torch.where(slot < cache.fill[..., None], slot, -1)
    oldest = torch.full_like(slot, cache.slots).scatter_reduce(
        -1, target, torch.where(survivor < 0, cache.slots, survivor), "amin"
    )
    gates = torch.cat([cache.gates, torch.ones_like(cache.gates[..., :1])], dim=-1).gather(-1, oldest)
    cache.gates.copy_(gates)
    cache.fill.copy_(fill + boundary.to(fill.dtype))


def _pair_to_merge(cache: MergeCache, rule: str, policy: str) -> Tensor:
    """Index [B, H] of the adjacent pair the capacity rule merges in a full cache."""
    if rule == "oldest" or policy == "fixed" or cache.slots == 1:
        return torch.zeros_like(cache.fill)
    if rule == "random":
        return random_pair(cache.position, cache.slots - 1)[:, None].expand_as(cache.fill)
    scores = cache.scores[..., 1:] + cache.scores[..., :-1]
    if rule == "mass":
        return scores.argmin(-1)
    counts = cache.counts[..., 1:] + cache.counts[..., :-1]
    return (scores / counts).argmin(-1)


def _at_slot(states: Tensor, index: Tensor) -> Tensor:
    """states [B,H,S,K,V] at slot index [B,H] -> [B,H,K,V]."""
    return states.gather(2, index[..., None, None, None].expand(-1, -1, 1, *states.shape[3:]))[:, :, 0]


def _by_rank(values: Tensor, rank: Tensor) -> Tensor:
    """Reorder [B,H,S] from oldest first to recency rank; ranks without a slot get -inf."""
    out = values.new_full((*values.shape[:-1], values.shape[-1] + 1), float("-inf"))
    return out.scatter(-1, torch.where(rank >= 0, rank, values.shape[-1]), values)[..., :-1]
