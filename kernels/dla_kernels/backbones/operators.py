"""Chunk operators of a backbone (design section 5): everything mixing needs to know of it.

With T = (I + strictlower(erase_i k_i.k_j e^(G_i-G_j)))^-1 diag(write), Wy = T diag(e^G) K and A = lower((q.k)
e^(G_i-G_j)):

    mixing [C,C] = A T      query [C,K] = e^G q - A Wy      key_end [C,K] = T^T (e^(G_C-G) k)
    transition [K,K] = e^(G_C) I - (e^(G_C-G) k)^T Wy

Without erasing T and Wy vanish. Decays are formed as exp(G_i - G_j), never as quotients, which would overflow. With
closed slots frozen, a token's decay stops where its segment ends, T is masked to pairs of one segment (the inverse of
a trailing block of a unit lower triangular matrix is the trailing block of the inverse, so one T serves every
segment), closed slots are read with q itself and only the slot that entered the chunk open is transitioned, up to its
own end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkOperators:
    """What a chunk does to tokens and states; all [B, H, N, ...]. A transition is [1, 1] (a decay), [K, K], or None
    (identity)."""

    mixing: Tensor
    """[C, C]: o_t gets mixing[t, l] v_l for every l <= t."""
    query_closed: Tensor
    """[C, K]: reads a slot that was closed when the chunk began, as it was then."""
    query_open: Tensor
    """[C, K]: reads the slot that was open when the chunk began."""
    key_end: Tensor
    """[C, K]: key_end_l v_l^T is what token l leaves in its slot at the chunk's end."""
    transition_closed: Tensor | None
    """What the chunk does to a closed slot."""
    transition_open: Tensor
    """What the chunk does to the slot that was open when it began."""


def write_matrix(k: Tensor, cum_log_decay: Tensor, erase: Tensor | None, write: Tensor | None) -> Tensor | None:
    """T [.., C, C] of k [.., C, K], cum_log_decay G, erase and write [.., C]; None stands for the identity."""
    if erase is None:
        return None if write is None else torch.diag_embed(write)
    decay = causal_decay(cum_log_decay, cum_log_decay, strict=True)
    system = erase[..., :, None] * (k @ k.transpose(-1, -2)) * decay
    strength = torch.diag_embed(erase if write is None else write)
    # Not a Neumann product of powers: for repeated keys those grow like binomials and cancel to nothing in float32.
    return torch.linalg.solve_triangular(system, strength, upper=False, unitriangular=True)


def causal_decay(reader: Tensor, writer: Tensor, *, strict: bool = False) -> Tensor:
    """exp(reader_i - writer_j) for j <= i (j < i if strict), 0 elsewhere: [.., C] x [.., C] -> [.., C, C]."""
    size = reader.shape[-1]
    above = torch.ones(size, size, dtype=torch.bool, device=reader.device).triu(0 if strict else 1)
    exponent = (reader[..., :, None] - writer[..., None, :]).masked_fill(above, float("-inf"))
    return exponent.exp()


def chunk_operators(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    erase: Tensor | None,
    write: Tensor | None,
    *,
    frozen_after: Tensor | None = None,
) -> ChunkOperators:
    """Operators of q, k [B,H,N,C,K] and log_decay, erase, write [B,H,N,C].

    frozen_after: boundaries [B,H,N,C] bool when closed slots are frozen, None when they keep their transitions.
    """
    cum = log_decay.cumsum(-1)
    matrix = write_matrix(k, cum, erase, write)
    if frozen_after is None:
        return _with_transitions(q, k, cum, matrix)
    return _frozen(q, k, cum, matrix, frozen_after)


def erased_keys(k: Tensor, cum: Tensor, matrix: Tensor) -> Tensor:
    """Wy = T diag(e^G) K: what the chunk's tokens erase of a state it began with, [.., C, K]."""
    return matrix @ (cum.exp()[..., None] * k)


def carry_operators(k: Tensor, cum: Tensor, matrix: Tensor | None) -> tuple[Tensor, Tensor]:
    """(key_end [.., C, K], transition [.., 1, 1] or [.., K, K]) of k [.., C, K] and cum = G [.., C]; T None: no
    erasing."""
    to_end = (cum[..., -1:] - cum).exp()[..., None] * k
    whole = cum[..., -1].exp()[..., None, None]
    if matrix is None:
        return to_end, whole
    whole = whole * _identity(k) - to_end.transpose(-1, -2) @ erased_keys(k, cum, matrix)
    return matrix.transpose(-1, -2) @ to_end, whole


def _with_transitions(q: Tensor, k: Tensor, cum: Tensor, matrix: Tensor | None) -> ChunkOperators:
    attention = (q @ k.transpose(-1, -2)) * causal_decay(cum, cum)
    query = cum.exp()[..., None] * q
    key_end, whole = carry_operators(k, cum, matrix)
    if matrix is not None:
        query = query - attention @ erased_keys(k, cum, matrix)
        attention = attention @ matrix
    return ChunkOperators(attention, query, query, key_end, whole, whole)


def _frozen(q: Tensor, k: Tensor, cum: Tensor, matrix: Tensor | None, boundary: Tensor) -> ChunkOperators:
    segment = boundary.cumsum(-1)
    same = segment[..., :, None] == segment[..., None, :]
    entered_open = segment == 0
    # Decays never rise, so the cumulative decay at a segment's end is its least one within the segment.
    at_end = torch.where(same, cum[..., None, :], torch.inf).amin(-1)
    open_end = torch.where(entered_open, cum, 0.0).amin(-1, keepdim=True)

    reader = torch.maximum(cum[..., :, None], at_end[..., None, :])
    causal = torch.ones(cum.shape[-1], cum.shape[-1], dtype=torch.bool, device=cum.device).tril()
    attention = (q @ k.transpose(-1, -2)) * (reader - cum[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    to_end = (at_end - cum).exp()[..., None] * k
    query_open = torch.maximum(cum, open_end).exp()[..., None] * q
    whole_open = open_end.exp()[..., None]
    if matrix is None:
        return ChunkOperators(attention, q, query_open, to_end, None, whole_open)
    matrix = matrix * same
    erased = erased_keys(k, cum, matrix) * entered_open[..., None]
    query_open = query_open - attention @ erased
    whole_open = whole_open * _identity(k) - (to_end * entered_open[..., None]).transpose(-1, -2) @ erased
    return ChunkOperators(attention @ matrix, q, query_open, matrix.transpose(-1, -2) @ to_end, None, whole_open)


def apply_transition(matrix: Tensor | None, states: Tensor) -> Tensor:
    """A transition of ChunkOperators ([..., 1, 1], [..., K, K] or None) on states [..., S, K, V]."""
    if matrix is None:
        return states
    return matrix[..., None, :, :] * states if matrix.shape[-1] == 1 else matrix[..., None, :, :] @ states


def _identity(k: Tensor) -> Tensor:
    return torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
