"""Chunk operators of a backbone (docs/dla.md section 5): everything mixing needs to know of it.

With T = (I + strictlower(beta_i k_i.k_j e^(G_i-G_j)))^-1 diag(beta), Wy = T diag(e^G) K and A = lower((q.k)
e^(G_i-G_j)):

    mixing [C,C] = A T      query [C,K] = e^G q - A Wy      key_end [C,K] = T^T (e^(G_C-G) k)
    transition = e^(G_C) I - (e^(G_C-G) k)^T Wy, kept as its factors: of rank C, often less than K

Without beta T is the identity and Wy vanishes. Decays are formed as exp(G_i - G_j), never as quotients, which would
overflow. With closed slots frozen, a token's decay stops where its segment ends, T is masked to pairs of one segment
(the inverse of a trailing block of a unit lower triangular matrix is the trailing block of the inverse, so one T serves
every segment), closed slots are read with q itself and only the slot that entered the chunk open is transitioned, up to
its own end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transition:
    """What a chunk does to a state [K, V] it began with: decay S - restore^T (erase S)."""

    decay: Tensor
    """[B, H, N]: what is left of a state where nothing is erased."""
    erase: Tensor | None
    """[B, H, N, C, K]: Wy, what each token reads of the state to erase it; None where the backbone erases nothing."""
    restore: Tensor | None
    """[B, H, N, C, K]: e^(G_C-G) k, where what was read is taken away; None with `erase`."""

    def dense(self) -> Tensor:
        """As one matrix for `apply_transition`: [B, H, N, K, K], or [B, H, N, 1, 1] where nothing is erased."""
        decay = self.decay[..., None, None]
        if self.erase is None or self.restore is None:
            return decay
        identity = torch.eye(self.erase.shape[-1], dtype=self.erase.dtype, device=self.erase.device)
        return decay * identity - self.restore.transpose(-1, -2) @ self.erase


@dataclass(frozen=True)
class ChunkOperators:
    """What a chunk does to tokens and states; all [B, H, N, ...]."""

    mixing: Tensor
    """[C, C]: o_t gets mixing[t, l] v_l for every l <= t."""
    query_closed: Tensor
    """[C, K]: reads a slot that was closed when the chunk began, as it was then."""
    query_open: Tensor
    """[C, K]: reads the slot that was open when the chunk began."""
    key_end: Tensor
    """[C, K]: key_end_l v_l^T is what token l leaves in its slot at the chunk's end."""
    transition_closed: Transition | None
    """What the chunk does to a closed slot; None where it leaves it as it is."""
    transition_open: Transition
    """What the chunk does to the slot that was open when it began."""


def visible_tokens(document_start: Tensor, chunk: int) -> Tensor:
    """Which tokens of its chunk a token sees: itself and earlier ones of its document, [B, 1, N, C, C] bool.

    document_start [B, T] as in MemoryPlan; padding continues the last document, so a chunk's last row is its end.
    """
    pad = -document_start.shape[1] % chunk
    start = torch.cat([document_start, document_start[:, -1:].expand(-1, pad)], dim=1).unflatten(1, (-1, chunk))[
        :, None
    ]
    time = torch.arange(start.shape[2] * chunk, device=start.device).view(1, 1, -1, chunk)
    return (time[..., None, :] <= time[..., :, None]) & (time[..., None, :] >= start[..., :, None])


def document_cumsum(log_decay: Tensor, sees: Tensor) -> Tensor:
    """G [.., C]: cumulative log-decay since the chunk's or the document's start.

    A masked sum, not a running one: other documents add exact zeros and cannot change this one's rounding.
    """
    return torch.where(sees, log_decay[..., None, :], 0.0).sum(-1)


def write_matrix(k: Tensor, cum_log_decay: Tensor, beta: Tensor | None, sees: Tensor) -> Tensor | None:
    """T [.., C, C] of k [.., C, K], cum_log_decay G and beta [.., C], sees [.., C, C]; None stands for the identity."""
    if beta is None:
        return None
    decay = causal_decay(cum_log_decay, cum_log_decay, sees, strict=True)
    system = beta[..., :, None] * (k @ k.transpose(-1, -2)) * decay
    # Not a Neumann product of powers: for repeated keys those grow like binomials and cancel to nothing in float32.
    return torch.linalg.solve_triangular(system, torch.diag_embed(beta), upper=False, unitriangular=True)


def causal_decay(reader: Tensor, writer: Tensor, sees: Tensor, *, strict: bool = False) -> Tensor:
    """exp(reader_i - writer_j) where i sees j (and j < i if strict), 0 elsewhere: [.., C] x [.., C] -> [.., C, C]."""
    hidden = ~(sees.tril(-1) if strict else sees)
    return (reader[..., :, None] - writer[..., None, :]).masked_fill(hidden, float("-inf")).exp()


def chunk_operators(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    sees: Tensor,
    *,
    frozen_after: Tensor | None = None,
) -> ChunkOperators:
    """Operators of q, k [B,H,N,C,K], log_decay, beta [B,H,N,C] and sees [B,1,N,C,C] of `visible_tokens`.

    frozen_after: boundaries [B,H,N,C] bool when closed slots are frozen, None when they keep their transitions.
    """
    cum = document_cumsum(log_decay, sees)
    matrix = write_matrix(k, cum, beta, sees)
    if frozen_after is None:
        return _with_transitions(q, k, cum, matrix, sees)
    return _frozen(q, k, cum, matrix, frozen_after, sees)


def erased_keys(k: Tensor, cum: Tensor, matrix: Tensor) -> Tensor:
    """Wy = T diag(e^G) K: what the chunk's tokens erase of a state it began with, [.., C, K]."""
    return matrix @ (cum.exp()[..., None] * k)


def carry_operators(k: Tensor, cum: Tensor, matrix: Tensor | None, sees: Tensor) -> tuple[Tensor, Tensor]:
    """(key_end [.., C, K], transition [.., 1, 1] or [.., K, K]) of k [.., C, K], G [.., C]; T None: no erasing."""
    key_end, whole = _carry(k, cum, matrix, sees)
    return key_end, whole.dense()


def _carry(k: Tensor, cum: Tensor, matrix: Tensor | None, sees: Tensor) -> tuple[Tensor, Transition]:
    to_end = (cum[..., -1:] - cum).masked_fill(~sees[..., -1, :], float("-inf")).exp()[..., None] * k
    decay = cum[..., -1].exp()
    if matrix is None:
        return to_end, Transition(decay, None, None)
    return matrix.transpose(-1, -2) @ to_end, Transition(decay, erased_keys(k, cum, matrix), to_end)


def _with_transitions(q: Tensor, k: Tensor, cum: Tensor, matrix: Tensor | None, sees: Tensor) -> ChunkOperators:
    attention = (q @ k.transpose(-1, -2)) * causal_decay(cum, cum, sees)
    query = cum.exp()[..., None] * q
    key_end, whole = _carry(k, cum, matrix, sees)
    if matrix is not None and whole.erase is not None:
        query = query - attention @ whole.erase
        attention = attention @ matrix
    return ChunkOperators(attention, query, query, key_end, whole, whole)


def _frozen(q: Tensor, k: Tensor, cum: Tensor, matrix: Tensor | None, boundary: Tensor, sees: Tensor) -> ChunkOperators:
    segment = boundary.cumsum(-1)
    same = segment[..., :, None] == segment[..., None, :]
    entered_open = segment == 0
    # By place, not as the least decay of the segment: where tokens do not decay, a least one has no one gradient.
    place = torch.arange(cum.shape[-1], device=cum.device)
    at_end = cum.gather(-1, torch.where(same, place, 0).amax(-1))
    open_end = torch.where(entered_open[..., :1], at_end[..., :1], 0.0)

    reader = torch.where(same, cum[..., :, None], at_end[..., None, :])
    attention = (q @ k.transpose(-1, -2)) * (reader - cum[..., None, :]).masked_fill(~sees, float("-inf")).exp()
    to_end = (at_end - cum).exp()[..., None] * k
    entered = torch.where(entered_open, cum, open_end)
    # Another document has no use for it; the larger one is what the kernels, which need no mask so, have there.
    entered = torch.where(sees[..., :, 0], entered, torch.maximum(cum, open_end))
    query_open = entered.exp()[..., None] * q
    decay = open_end[..., 0].exp()
    if matrix is None:
        return ChunkOperators(attention, q, query_open, to_end, None, Transition(decay, None, None))
    matrix = matrix * same
    erased = erased_keys(k, cum, matrix) * entered_open[..., None]
    whole = Transition(decay, erased, to_end * entered_open[..., None])
    query_open = query_open - attention @ erased
    return ChunkOperators(attention @ matrix, q, query_open, matrix.transpose(-1, -2) @ to_end, None, whole)


def apply_transition(matrix: Tensor | None, states: Tensor) -> Tensor:
    """A dense transition ([..., 1, 1], [..., K, K], or None: the identity) on states [..., S, K, V]."""
    if matrix is None:
        return states
    return matrix[..., None, :, :] * states if matrix.shape[-1] == 1 else matrix[..., None, :, :] @ states
