"""The pass of the S states over chunks, forward and backward (docs/dla.md section 5).

Forward keeps one thing per chunk, the states it began with; autograd through the same steps would keep five times as
much (the read weights times the queries, the keys spread over slots, the moved states). Backward walks the chunks in
reverse with the states' adjoint and makes the spread products again, which costs no matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dla_kernels.backbones.operators import ChunkOperators, apply_transition
from dla_kernels.memory.slots import ChunkSlots


def scan_states(
    initial: Tensor, operators: ChunkOperators, slots: ChunkSlots, weights: Tensor, values: Tensor, *, frozen: bool
) -> tuple[Tensor, Tensor]:
    """Read every chunk's starting states and carry them on: (reads [B,H,N,C,V], final states [B,H,S,K,V]).

    initial [B,H,S,K,V]; weights [B,H,N,C,S] of the slots alive at each chunk's start, values [B,H,N,C,V].
    Differentiable once, in initial, the operators, weights and values.
    """
    capacity, dtype = initial.shape[2], initial.dtype
    routes = _Routes(
        joined=_one_hot(slots.end_of_slot, capacity, dtype).unbind(2),
        landed=_one_hot(slots.end_of_token, capacity, dtype).unbind(2),
        newest=(slots.fill[:, :, :-1] - 1).clamp_min(0).unbind(2) if frozen else None,
    )
    open_query = operators.query_open - operators.query_closed if frozen else None
    open_transition = operators.transition_open.dense() if frozen else None
    reads, states = _Scan.apply(
        routes,
        initial,
        operators.query_closed,
        operators.key_end,
        values,
        weights,
        None if operators.transition_closed is None else operators.transition_closed.dense(),
        open_query,
        open_transition,
    )
    return reads, states


@dataclass(frozen=True)
class _Routes:
    """Where slots and tokens go, chunk by chunk; one-hot, so that moving is a product."""

    joined: tuple[Tensor, ...]
    """[B, H, S, S]: of where each slot at the chunk's start ends up; a zero row where it is dropped."""
    landed: tuple[Tensor, ...]
    """[B, H, C, S]: of the slot each token ends up in."""
    newest: tuple[Tensor, ...] | None
    """[B, H] int64: the slot that is open when the chunk begins, where closed slots are frozen."""

    def is_open(self, n: int, states: Tensor) -> Tensor:
        """[B, H, S, 1, 1] bool: the slot that was open when chunk n began."""
        assert self.newest is not None
        return F.one_hot(self.newest[n], states.shape[2]).to(torch.bool)[..., None, None]


class _Scan(torch.autograd.Function):
    """Inputs as in `scan_states`; transition None: identity. The open_ pair is given where closed slots are frozen:
    open_query is what the open slot's query has more than a closed one's."""

    @staticmethod
    def forward(
        ctx: Any,
        routes: _Routes,
        initial: Tensor,
        query: Tensor,
        key_end: Tensor,
        values: Tensor,
        weights: Tensor,
        transition: Tensor | None,
        open_query: Tensor | None,
        open_transition: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        states, entered, reads = initial, [], []
        for n in range(query.shape[2]):
            if any(ctx.needs_input_grad):
                entered.append(states)
            spread = _spread(weights[:, :, n], query[:, :, n])
            read = spread @ states.flatten(2, 3)
            moved = apply_transition(_at(transition, n), states)
            if open_query is not None and open_transition is not None:
                is_open = routes.is_open(n, states)
                open_state = (states * is_open).sum(2)
                read = read + _open_weight(weights[:, :, n], is_open) * (open_query[:, :, n] @ open_state)
                moved = torch.where(is_open, apply_transition(open_transition[:, :, n], open_state[:, :, None]), moved)
            keys = _spread(routes.landed[n], key_end[:, :, n])
            joined = routes.joined[n].transpose(-1, -2) @ moved.flatten(-2)
            written = keys.transpose(-1, -2) @ values[:, :, n]
            states = joined.view_as(states) + written.view_as(states)
            reads.append(read)
        ctx.routes = routes
        ctx.save_for_backward(query, key_end, values, weights, transition, open_query, open_transition, *entered)
        return torch.stack(reads, 2), states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_reads, adjoint = grads
        routes: _Routes = ctx.routes
        query, key_end, values, weights, transition, open_query, open_transition, *entered = ctx.saved_tensors
        inputs = (query, key_end, values, weights, transition, open_query, open_transition)
        into = [None if x is None else torch.empty_like(x) for x in inputs]
        d_query, d_key, d_value, d_weight, d_transition, d_open_query, d_open_transition = into
        assert d_query is not None and d_key is not None and d_value is not None and d_weight is not None
        for n in reversed(range(query.shape[2])):
            states, d_read = entered[n], d_reads[:, :, n]
            capacity = states.shape[2]
            flat, d_flat = states.flatten(2, 3), adjoint.flatten(2, 3)
            d_value[:, :, n] = _spread(routes.landed[n], key_end[:, :, n]) @ d_flat
            d_keys = (values[:, :, n] @ d_flat.transpose(-1, -2)).unflatten(-1, (capacity, -1))
            d_key[:, :, n] = (routes.landed[n][..., None] * d_keys).sum(-2)
            d_moved = (routes.joined[n] @ adjoint.flatten(-2)).view_as(states)

            spread = _spread(weights[:, :, n], query[:, :, n])
            d_spread = (d_read @ flat.transpose(-1, -2)).unflatten(-1, (capacity, -1))
            d_query[:, :, n] = (weights[:, :, n, :, :, None] * d_spread).sum(-2)
            d_weight[:, :, n] = (d_spread * query[:, :, n, :, None, :]).sum(-1)
            adjoint = (spread.transpose(-1, -2) @ d_read).view_as(states)
            if d_open_query is not None and d_open_transition is not None:
                is_open = routes.is_open(n, states)
                open_state = (states * is_open).sum(2)
                extra, weight = open_query[:, :, n], _open_weight(weights[:, :, n], is_open)
                d_extra = weight * d_read
                d_weight[:, :, n] += is_open[:, :, None, :, 0, 0] * (d_read * (extra @ open_state)).sum(
                    -1, keepdim=True
                )
                d_open_query[:, :, n] = d_extra @ open_state.transpose(-1, -2)
                d_open_moved = (d_moved * is_open).sum(2, keepdim=True)
                d_open_transition[:, :, n] = _d_transition(open_transition, d_open_moved, open_state[:, :, None])
                d_open = _back(open_transition[:, :, n], d_open_moved) + (extra.transpose(-1, -2) @ d_extra)[:, :, None]
                adjoint = adjoint + torch.where(is_open, d_open, d_moved)
            elif d_transition is not None:
                d_transition[:, :, n] = _d_transition(transition, d_moved, states)
                adjoint = adjoint + _back(transition[:, :, n], d_moved)
        return (None, adjoint, *into)


def _spread(weight: Tensor, rows: Tensor) -> Tensor:
    """[.., C, S] x [.., C, K] -> [.., C, S*K]: every row once a slot, by its weight there."""
    return (weight[..., :, None] * rows[..., None, :]).flatten(-2)


def _open_weight(weights: Tensor, is_open: Tensor) -> Tensor:
    """Read weight [B, H, C, 1] of the open slot."""
    return (weights * is_open[:, :, None, :, 0, 0]).sum(-1, keepdim=True)


def _back(matrix: Tensor, d_moved: Tensor) -> Tensor:
    """Adjoint of `apply_transition` with respect to the states."""
    return apply_transition(matrix.transpose(-1, -2), d_moved)


def _d_transition(matrix: Tensor, d_moved: Tensor, states: Tensor) -> Tensor:
    """Adjoint of `apply_transition` with respect to one chunk's matrix, in the shape [1, 1] or [K, K] of `matrix`."""
    if matrix.shape[-1] == 1:
        return (d_moved * states).sum((-1, -2, -3))[..., None, None]
    return (d_moved @ states.transpose(-1, -2)).sum(-3)


def _at(matrix: Tensor | None, n: int) -> Tensor | None:
    return None if matrix is None else matrix[:, :, n]


def _one_hot(index: Tensor, capacity: int, dtype: torch.dtype) -> Tensor:
    """One-hot over S slots; index S (dropped) gives a zero row."""
    return (index[..., None] == torch.arange(capacity, device=index.device)).to(dtype)
