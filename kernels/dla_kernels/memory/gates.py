"""Soft boundaries and content reading: from scores and affinities to read weights (docs/dla.md sections 2.5 and 2.6).

A weak boundary reads as if its two slots were merged: w_0 = lambda_0, w_r = p_r lambda_r + (1 - p_r) w_(r-1), with p_r
the gate of the boundary between the slots of ranks r and r-1. p = 1 is the hard rule, so inference needs none of this.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_kernels.launch import resolve_backend
from dla_kernels.memory.slots import chunk_slots
from dla_kernels.plan import MemoryPlan


class _PlannedScore(torch.autograd.Function):
    """The plan's score as a function of k and v, by the gradients the planner kept."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, score: Tensor, grad_k: Tensor, grad_v: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(grad_k, grad_v)
        ctx.groups, ctx.dtypes = groups, (k.dtype, v.dtype)
        return score.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_k, grad_v = ctx.saved_tensors
        upstream = grads[0][..., None]
        per_head = upstream * grad_k
        to_k = per_head.unflatten(2, (-1, ctx.groups)).sum(3)
        return to_k.to(ctx.dtypes[0]), (upstream * grad_v).to(ctx.dtypes[1]), None, None, None, None


def boundary_score(k: Tensor, v: Tensor, plan: MemoryPlan) -> Tensor:
    """Drift I_t [B, T, H] at boundaries (0 elsewhere), differentiable in k [B,T,Hk,K] and v [B,T,H,V].

    The open state is held constant (docs/dla.md section 2.6). Raises ValueError if the plan was made without
    `score_gradients`.
    """
    if plan.score_gradients is None:
        raise ValueError("the plan holds no score gradients; make it with plan_memory(..., score_gradients=True)")
    score = torch.where(plan.boundary, plan.score, 0.0)
    result: Tensor = _PlannedScore.apply(k, v, score, *plan.score_gradients, v.shape[2] // k.shape[2])
    return result


def boundary_gate(
    score: Tensor, plan: MemoryPlan, *, tau: Tensor | float, temperature: float, gate: str = "soft"
) -> Tensor:
    """p = sigmoid((I - tau) / temperature) [B, T, H] at boundaries, 1 elsewhere and at a document's first token.

    tau: [H] or a float. gate: `soft`; `straight_through` has the value 1 and the soft gate's gradient.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive; use hard gates (gates=None) for the limit 0")
    if gate not in ("soft", "straight_through"):
        raise ValueError(f"gate={gate!r} must be 'soft' or 'straight_through'; hard gates are gates=None")
    inner = plan.boundary & (plan.positions > 0)[..., None]
    soft = torch.sigmoid((score - tau) / temperature)
    if gate == "straight_through":
        soft = 1.0 + (soft - soft.detach())
    return torch.where(inner, soft, 1.0)


def gate_read_weights(
    weights: Tensor, gates: Tensor, plan: MemoryPlan, carried_gates: Tensor | None, chunk: int
) -> Tensor:
    """Apply the gates [B, H, T] of boundaries to read weights [B, H, T, S] by recency rank."""
    carried = (
        torch.ones_like(plan.carried_start, dtype=gates.dtype) if carried_gates is None else carried_gates.to(gates)
    )
    # Between ranks r and r-1 lies the boundary that starts slot r-1: hence the shift by one rank.
    between = chunk_slots(plan, chunk).boundary_values_by_rank(gates, carried, shift=1, fill=1.0)
    return soften(weights, between)


def soften(weights: Tensor, between: Tensor) -> Tensor:
    """Read weights [..., S] by recency rank, each mixed with the next newer one by the gate between the two.

    between [..., S]: entry r holds the gate of the boundary between the slots of ranks r and r-1; entry 0 is not read.
    """
    gated = [weights[..., 0]]
    for rank in range(1, weights.shape[-1]):
        p = between[..., rank]
        gated.append(p * weights[..., rank] + (1.0 - p) * gated[-1])
    return torch.stack(gated, dim=-1)


def content_read_weights(
    slot_weights: Tensor, affinity: Tensor, *, gain: Tensor, sharpness: Tensor, backend: str | None = None
) -> Tensor:
    """slot + gain_h * softmax(sharpness_h * affinity | null slot): [..., H, S] each, gain and sharpness [H].

    The null slot (logit 0) takes the weight no live slot earns. Dead slots (-inf) get no content weight. Source:
    docs/dla.md 2.5.
    """
    if resolve_backend(backend, affinity, slot_weights) == "triton":
        from dla_kernels.memory.gates_triton import content_read_weights_triton

        return content_read_weights_triton(slot_weights, affinity, gain, sharpness)
    logits = sharpness[:, None] * affinity.masked_fill(affinity == float("-inf"), torch.finfo(affinity.dtype).min / 1e4)
    shares = F.softmax(F.pad(logits, (0, 1)), dim=-1)[..., :-1]
    return slot_weights + gain[:, None] * shares


def log_linear_levels(positions: Tensor, slots: int, levels: int) -> Tensor:
    """Fenwick level of the slot of every recency rank: [..., slots] int64, clamped to the last trained level.

    The slot of level l > 0 exists at position t iff bit l-1 of t is set, and lower bits are newer: rank r > 0 is the
    r-th set bit. Level of token s at t is the bit length of t xor s (arXiv 2506.04761). Ranks without a slot hold the
    last level.
    """
    bits = torch.arange(62, device=positions.device)
    is_set = (positions[..., None] >> bits) & 1
    rank = torch.where(is_set.bool(), is_set.cumsum(-1), slots).clamp_(max=slots)
    out = torch.full((*positions.shape, slots + 1), levels - 1, dtype=torch.int64, device=positions.device)
    out = out.scatter(-1, rank, (bits + 1).clamp(max=levels - 1).expand_as(rank))
    out[..., 0] = 0
    return out[..., :slots]
