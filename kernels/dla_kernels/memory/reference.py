"""The token loop of docs/dla.md section 2: the definition every other path is tested against (float64 capable).

Written to be read beside the text, one token after the other, all heads at once. Autograd differentiates it as it
stands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dla_kernels.backbones.recurrence import transition, write_of
from dla_kernels.inputs import compute_dtype, heads_first
from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.drift import Drift, drift_from_cosine
from dla_kernels.memory.merging import Merges, random_pair
from dla_kernels.plan import NEVER, MemoryPlan


def token_score(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, open_state: Tensor, drift: str) -> Tensor:
    """I_t [...] of one token against S_open [..., K, V], k [..., K], v [..., V]: docs/dla.md section 2.1."""
    candidate = write_of(k, v, None)  # without its strength: no cosine depends on it, but at 0 it would hide the write
    if drift == "update":
        candidate = transition(open_state[..., None, :, :], k, log_decay, beta)[..., 0, :, :] + write_of(k, v, beta)
    size = candidate.square().sum((-1, -2)) * open_state.square().sum((-1, -2))
    positive = size > 0
    inner = (candidate * open_state).sum((-1, -2))
    return drift_from_cosine(torch.where(positive, inner * torch.where(positive, size, 1.0).rsqrt(), 0.0))


def recurrent_drift(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    document_start: Tensor,
    *,
    tau: Tensor,
    drift: str,
    cache: MergeCache | None,
) -> Drift:
    """Scores and boundaries [B, H, T] token by token; the scores carry gradients to k and v, the open state none."""
    heads, dtype = v.shape[2], compute_dtype(k, v)
    k, v, log_decay = (heads_first(x, heads, dtype) for x in (k, v, log_decay))
    beta = None if beta is None else heads_first(beta, heads, dtype)
    batch, _, tokens, key_dim = k.shape
    newest = None if cache is None else (cache.fill - 1).clamp_min(0)[..., None, None, None]
    state = torch.zeros(batch, heads, key_dim, v.shape[-1], dtype=dtype, device=k.device)
    if cache is not None and newest is not None:
        state = cache.states.gather(2, newest.expand(-1, -1, 1, *state.shape[2:]))[:, :, 0].to(dtype)
    scores, boundaries = [], []
    for t in range(tokens):
        gate = None if beta is None else beta[:, :, t]
        head = (document_start[:, t] == t)[:, None]
        score = token_score(k[:, :, t], v[:, :, t], log_decay[:, :, t], gate, state.detach(), drift)
        score = torch.where(head, 0.0, score.float())
        boundary = (score >= tau) | head
        moved = transition(state[..., None, :, :], k[:, :, t], log_decay[:, :, t], gate)[..., 0, :, :]
        state = torch.where(boundary[..., None, None], 0.0, moved) + write_of(k[:, :, t], v[:, :, t], gate)
        scores.append(score)
        boundaries.append(boundary)
    return Drift(torch.stack(scores, -1), torch.stack(boundaries, -1), None)


def recurrent_merges(
    boundary: Tensor,
    score: Tensor,
    document_start: Tensor,
    *,
    capacity: int,
    rule: str,
    carried_start: Tensor,
    carried_scores: Tensor,
    carried_fill: Tensor,
) -> Merges:
    """Deaths under `capacity` slots, one head after the other; a slot is (boundary, score sum, count), section 2.3."""
    batch, heads, tokens = boundary.shape
    death = torch.full((batch, heads, tokens), NEVER, dtype=torch.int64)
    carried_death = torch.full((batch, heads, capacity), NEVER, dtype=torch.int64)
    merged = torch.full((batch, heads, tokens), -1, dtype=torch.int64)
    for b in range(batch):
        for h in range(heads):
            fill = int(carried_fill[b, h])
            starts = carried_start[b, h, :fill].tolist() + [0]
            slots = [[i - capacity, float(carried_scores[b, h, i]), starts[i + 1] - starts[i]] for i in range(fill)]
            for t in range(tokens):
                if document_start[b, t] == t:
                    slots = []
                if boundary[b, h, t]:
                    if len(slots) == capacity > 1:
                        pair = _pair_to_merge(slots, rule, t - int(document_start[b, t]))
                        kept, gone = slots[pair], slots.pop(pair + 1)
                        kept[1] += gone[1]
                        kept[2] += gone[2]
                        deaths, at = (carried_death, capacity + gone[0]) if gone[0] < 0 else (death, gone[0])
                        deaths[b, h, int(at)] = t
                        merged[b, h, t] = pair
                    slots.append([t, 0.0, 0])
                slots[-1][1] += float(score[b, h, t])
                slots[-1][2] += 1
    device = boundary.device
    return Merges(death.to(device), carried_death.to(device), merged.to(device))


def _pair_to_merge(slots: list[list[float]], rule: str, position: int) -> int:
    pairs = len(slots) - 1
    if rule == "oldest":
        return 0
    if rule == "random":
        return int(random_pair(torch.tensor(position), pairs))
    mass = [a[1] + b[1] for a, b in zip(slots, slots[1:], strict=False)]
    tokens = [a[2] + b[2] for a, b in zip(slots, slots[1:], strict=False)]
    cost = mass if rule == "mass" else [m / n for m, n in zip(mass, tokens, strict=True)]
    return cost.index(min(cost))


def recurrent_mix(
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
) -> tuple[Tensor, Tensor]:
    """Outputs [B,H,T,V] and final states [B,H,S,K,V] of a plan, token by token; weights [B,H,T,S] by recency rank."""
    heads, dtype, capacity = v.shape[2], compute_dtype(q, k, v), plan.capacity
    q, k, v, log_decay = (heads_first(x, heads, dtype) for x in (q, k, v, log_decay))
    beta = None if beta is None else heads_first(beta, heads, dtype)
    batch, _, tokens, key_dim = k.shape
    states = torch.zeros(batch, heads, capacity, key_dim, v.shape[-1], dtype=dtype, device=k.device)
    if cache is not None:
        states = cache.states.to(dtype)
    offset = plan.origin[..., None]
    starts = torch.where(
        torch.arange(capacity, device=k.device) < plan.carried_fill[..., None], plan.carried_start + offset, -1
    )
    slot = torch.arange(capacity, device=k.device)
    outputs = []
    for t, now in enumerate(plan.slot_starts().unbind(1)):
        fresh = (plan.document_start[:, t] == t)[:, None, None]
        joined = _joined_into(starts, now) & (starts >= 0)[..., None] & ~fresh[..., None]
        states = torch.einsum("bhij,bhikv->bhjkv", joined.to(dtype), states)
        newest = (now >= 0).sum(-1, keepdim=True) - 1
        is_open = (slot == newest)[..., None, None]
        gate = None if beta is None else beta[:, :, t]
        moved = transition(states, k[:, :, t], log_decay[:, :, t], gate)
        states = torch.where(is_open, moved, states) if frozen else moved
        states = states + is_open * write_of(k[:, :, t], v[:, :, t], gate)[:, :, None]
        read = torch.where(slot <= newest, weights[:, :, t].gather(-1, (newest - slot).clamp_min(0)), 0.0)
        outputs.append(scale * torch.einsum("bhs,bhk,bhskv->bhv", read, q[:, :, t], states))
        starts = now
    return torch.stack(outputs, 2), states


def _joined_into(before: Tensor, now: Tensor) -> Tensor:
    """[B, H, S, S] bool: slot i of `before` lies in slot j of `now`; both are starts, oldest first, -1 unused."""
    following = torch.cat([now[..., 1:], torch.full_like(now[..., :1], -1)], dim=-1)
    following = torch.where(following < 0, NEVER, following)
    inside = (before[..., :, None] >= now[..., None, :]) & (before[..., :, None] < following[..., None, :])
    return inside & (now >= 0)[..., None, :]


def recurrent_affinity(rho: Tensor, kappa: Tensor, plan: MemoryPlan, key_sums: Tensor | None) -> Tensor:
    """[B, H, T, S] by recency rank: rho_t . mean of kappa over the tokens of each slot; rho, kappa [B, H, T, R]."""
    batch, heads, tokens, _ = rho.shape
    capacity = plan.capacity
    total = rho.new_full((batch, heads, tokens, capacity), float("-inf"))
    starts = plan.slot_starts().transpose(1, 2).tolist()
    offset = plan.origin.tolist()
    rows = []
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                live = [s - offset[b][h] for s in starts[b][h][t] if s >= 0] + [t + 1]
                rows.append(
                    [
                        _mean_match(b, h, t, a, e, rho, kappa, plan, key_sums)
                        for a, e in zip(live[-2::-1], live[:0:-1], strict=True)
                    ]
                )
    values = [torch.stack([*row, *[total.new_tensor(float("-inf"))] * (capacity - len(row))]) for row in rows]
    return torch.stack(values).view(batch, heads, tokens, capacity)


def _mean_match(
    b: int, h: int, t: int, begin: int, end: int, rho: Tensor, kappa: Tensor, plan: MemoryPlan, key_sums: Tensor | None
) -> Tensor:
    keys = kappa[b, h, max(begin, 0) : max(end, 0)].sum(0)
    if begin < 0 and key_sums is not None:
        carried = plan.carried_start[b, h]
        used = torch.arange(plan.capacity, device=carried.device) < plan.carried_fill[b, h]
        keys = keys + key_sums[b, h][used & (carried >= begin) & (carried < end)].sum(0)
    return rho[b, h, t] @ keys / (end - begin)
