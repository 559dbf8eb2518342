"""Drift scores and boundaries by all-pairs tables (docs/dla.md section 6).

If a segment opened at token a of a chunk, the score of token t needs p = S_[a,t)^T k_t only through p.v_t, |p|^2 and
|S|^2, and all three follow for every pair (a, t) at once from C x C products. So the next boundary after every
possible opening is known in parallel; what is sequential is one pass over chunks, which scores the segment that
entered open against its state. Tables are indexed [t, a], t the scored token. Scores are float32: every backend
compares the same rounded number with tau.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_kernels.backbones import gates_of
from dla_kernels.backbones.operators import (
    apply_transition,
    carry_operators,
    causal_decay,
    document_cumsum,
    erased_keys,
    visible_tokens,
    write_matrix,
)
from dla_kernels.inputs import compute_dtype, heads_first, to_chunks
from dla_kernels.memory.cache import MergeCache

DRIFTS = ("token", "update")


@dataclass(frozen=True)
class Drift:
    """Scores and boundaries [B, H, T], and where asked for d score / d k [B,H,T,K] and d score / d v [B,H,T,V]."""

    score: Tensor
    boundary: Tensor
    gradients: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class _Moments:
    """What a score needs of S = S_open before token t; any shape that broadcasts against the token's own quantities."""

    value_match: Tensor
    """k^T S v."""
    recalled: Tensor
    """|S^T k|^2."""
    norm: Tensor
    """|S|_F^2."""


@dataclass(frozen=True)
class _Token:
    """Per-token quantities [B, H, N, C]."""

    key_norm: Tensor
    """|k|^2."""
    value_norm: Tensor
    """|v|^2."""
    log_decay: Tensor
    erase: Tensor
    write: Tensor

    def next_norm_gain(self, m: _Moments) -> Tensor:
        """|S'|^2 - e^(2g) |S|^2 for S' = e^g (I - erase k k^T) S + write k v^T."""
        decay = self.log_decay.exp()
        erased = (2 * self.erase - self.erase**2 * self.key_norm) * m.recalled
        crossed = self.write * (1 - self.erase * self.key_norm) * m.value_match
        return 2 * decay * crossed - decay**2 * erased + self.write**2 * self.key_norm * self.value_norm

    def at(self, where: tuple[Any, ...]) -> _Token:
        return _Token(
            *(getattr(self, name)[where] for name in ("key_norm", "value_norm", "log_decay", "erase", "write"))
        )


def drift_from_cosine(cosine: Tensor) -> Tensor:
    """I = sqrt(2 - 2 cos), in [0, 2]."""
    return (2 - 2 * cosine).clamp_min(0).sqrt()


def _cosine(token: _Token, m: _Moments, drift: str) -> Tensor:
    """Cosine between S_open and the token's write, or the state after it; 0 where either is zero."""
    if drift == "token":
        inner, size = m.value_match, token.key_norm * token.value_norm * m.norm
    else:
        decay = token.log_decay.exp()
        inner = decay * (m.norm - token.erase * m.recalled) + token.write * m.value_match
        size = (decay**2 * m.norm + token.next_norm_gain(m)) * m.norm
    positive = size > 0
    return torch.where(positive, inner * torch.where(positive, size, 1.0).rsqrt(), 0.0)


def chunk_drift(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    document_start: Tensor,
    *,
    tau: Tensor,
    drift: str,
    cache: MergeCache | None,
    chunk: int,
    gradients: bool,
) -> Drift:
    """Score every token against the open state before it and open a slot where the score reaches tau [H]."""
    heads, dtype, tokens = v.shape[2], compute_dtype(k, v), v.shape[1]

    def chunks(x: Tensor) -> Tensor:
        return to_chunks(heads_first(x, heads, dtype), chunk)

    sees = visible_tokens(document_start, chunk)
    scan = _Scan(chunks(k), chunks(v), chunks(log_decay), None if beta is None else chunks(beta), drift, sees)
    forced = _document_heads(document_start, chunk)
    tau = tau.to(device=k.device, dtype=torch.float32)[:, None]
    state = scan.empty_state() if cache is None else _open_state(cache).to(dtype)
    reached, table_score = scan.reachable_boundaries(tau, forced)
    scores, boundaries, states = [], [], []
    for n in range(scan.k.shape[2]):
        states.append(state)
        score, boundary, state = scan.walk(n, state, tau, forced[:, :, n], reached[:, :, n], table_score[:, :, n])
        scores.append(score)
        boundaries.append(boundary)
    boundary, score = torch.stack(boundaries, 2), torch.stack(scores, 2).masked_fill(forced, 0.0)

    def tokens_of(x: Tensor) -> Tensor:
        return x.flatten(2, 3)[:, :, :tokens]

    grads = None
    if gradients:
        grad_k, grad_v = scan.score_gradients(torch.stack(states, 2), boundary)
        grads = (tokens_of(grad_k), tokens_of(grad_v))
    return Drift(tokens_of(score), tokens_of(boundary), grads)


def _document_heads(document_start: Tensor, chunk: int) -> Tensor:
    """[B, 1, N, C] bool: the token is its document's first."""
    index = torch.arange(document_start.shape[1], device=document_start.device)
    return to_chunks((document_start == index)[:, None], chunk)


def _open_state(cache: MergeCache) -> Tensor:
    """The newest slot's state [B, H, K, V] (zero in an empty cache)."""
    index = (cache.fill - 1).clamp_min(0)[..., None, None, None]
    return cache.states.gather(2, index.expand(-1, -1, 1, *cache.states.shape[3:]))[:, :, 0]


class _Scan:
    """Tables of all chunks, and the pass over chunks that uses them."""

    def __init__(self, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, drift: str, sees: Tensor) -> None:
        self.k, self.v, self.drift, self.sees = k, v, drift, sees
        erase, write = gates_of(beta)
        ones = torch.ones_like(log_decay)
        self.token = _Token(
            k.square().sum(-1),
            v.square().sum(-1),
            log_decay,
            torch.zeros_like(ones) if erase is None else erase,
            ones if write is None else write,
        )
        cum = document_cumsum(log_decay, sees)
        self.cum_before = cum - log_decay
        self.matrix = write_matrix(k, cum, erase, write, sees)
        self.key_end, self.whole = carry_operators(k, cum, self.matrix, sees)
        before = causal_decay(self.cum_before, cum, sees, strict=True)
        recall = (k @ k.transpose(-1, -2)) * before
        self.key_open = self.cum_before.exp()[..., None] * k
        if self.matrix is not None:
            self.key_open = self.key_open - recall @ erased_keys(k, cum, self.matrix)
            recall = recall @ self.matrix
        self.recall = recall
        """[C, C]: S_[a,t)^T k_t = sum_{l >= a} recall[t, l] v_l."""
        self.recalled_values = recall @ v
        self.fade = causal_decay(2 * self.cum_before, 2 * cum, sees, strict=True)
        """[C, C]: how much of |S|^2 after token l is left before token t."""

    def empty_state(self) -> Tensor:
        batch, heads = self.k.shape[:2]
        return self.k.new_zeros(batch, heads, self.k.shape[-1], self.v.shape[-1])

    def reachable_boundaries(self, tau: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
        """For every opening a: the boundaries its walk passes through [B,H,N,a,t] bool; and scores [B,H,N,t,a]
        float32."""
        score = self._pair_scores()
        size = score.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=score.device).tril(-1)
        hit = ((score >= tau[..., None, None]) | forced[..., :, None]) & later
        jump = torch.where(hit.any(-2), hit.to(torch.int8).argmax(-2), size)
        return _closure(jump), score

    def _pair_scores(self) -> Tensor:
        """Score of token t against a segment opened at a: [B, H, N, t, a] float32 (meaningful for a < t)."""
        values = self.v @ self.v.transpose(-1, -2)
        matched = _suffix_sum(self.recall * values)
        cross = self.recall @ values.tril(-1)
        recalled = _suffix_sum(self.recall * (2 * cross + self.recall * self.token.value_norm[..., None, :]))
        token = self.token.at((..., None))
        moments = _Moments(matched, recalled, torch.zeros_like(matched))
        size = matched.shape[-1]
        opened = torch.ones(size, size, dtype=torch.bool, device=matched.device).tril()
        norm = self.fade @ (token.next_norm_gain(moments) * opened)
        return drift_from_cosine(_cosine(token, _Moments(matched, recalled, norm), self.drift)).float()

    def walk(
        self, n: int, state: Tensor, tau: Tensor, forced: Tensor, reached: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and boundaries [B, H, C] of chunk n entered with open state [B, H, K, V]; and the open state it
        leaves."""
        here = (slice(None), slice(None), n)
        size = table.shape[-1]
        recalled = self.recalled_values[here] + self.key_open[here] @ state
        moments = _Moments(
            (recalled * self.v[here]).sum(-1), recalled.square().sum(-1), torch.zeros_like(recalled[..., 0])
        )
        token = self.token.at(here)
        entered = state.square().sum((-1, -2))[..., None]
        norm = (2 * self.cum_before[here]).exp() * entered + (
            self.fade[here] @ token.next_norm_gain(moments)[..., None]
        )[..., 0]
        moments = _Moments(moments.value_match, moments.recalled, norm)
        carried = drift_from_cosine(_cosine(token, moments, self.drift)).float()

        hit = (carried >= tau) | forced
        first = torch.where(hit.any(-1), hit.to(torch.int8).argmax(-1), size)
        boundary = torch.cat([reached, torch.zeros_like(reached[..., :1, :])], dim=-2)
        boundary = boundary.gather(-2, first[..., None, None].expand(*first.shape, 1, size))[..., 0, :]
        index = torch.arange(size, device=state.device)
        latest = torch.where(boundary, index, -1).cummax(-1).values
        before = torch.cat([torch.full_like(latest[..., :1], -1), latest[..., :-1]], dim=-1)
        own = table.gather(-1, before.clamp_min(0)[..., None])[..., 0]
        score = torch.where(before < 0, carried, own)

        newest = latest[..., -1:]
        kept = self.key_end[here] * (index >= newest)[..., None]
        unbroken = (newest < 0)[..., None].to(state.dtype)
        moved = apply_transition(self.whole[here], state[..., None, :, :])[..., 0, :, :]
        return score, boundary, unbroken * moved + kept.transpose(-1, -2) @ self.v[here]

    def score_gradients(self, states: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor]:
        """d score / d k and d score / d v of every token [B,H,N,C,K|V], S_open constant; states [B,H,N,K,V] enter the
        chunks."""
        segment = boundary.cumsum(-1)
        opened_in = segment - boundary.to(segment.dtype)
        in_open = segment[..., None, :] == opened_in[..., :, None]
        entered = (opened_in == 0).to(states.dtype)[..., None]
        recalled = (self.recall * in_open) @ self.v + entered * (self.key_open @ states)
        size = self._open_norm(states, boundary, in_open, entered, recalled)
        open_times = self._open_product(states, segment, in_open, entered)
        key_side = open_times(self.v)
        twice = 2 * open_times(recalled) if self.drift == "update" else None
        with torch.enable_grad():
            k, v = self.k.detach().requires_grad_(), self.v.detach().requires_grad_()
            # Bilinear forms in S: the gradient of each factor is S times the other, held constant.
            matched = (k * key_side).sum(-1) + ((v - self.v) * recalled).sum(-1)
            square = recalled.square().sum(-1)
            if twice is not None:
                square = square + ((k - self.k) * twice).sum(-1)
            token = _Token(
                k.square().sum(-1), v.square().sum(-1), self.token.log_decay, self.token.erase, self.token.write
            )
            score = drift_from_cosine(_cosine(token, _Moments(matched, square, size), self.drift))
            grads = torch.autograd.grad(score.sum(), (k, v))
        positive = (score.detach() > 0)[..., None]  # the root has no gradient at 0, where no boundary is either
        return torch.where(positive, grads[0], 0.0), torch.where(positive, grads[1], 0.0)

    def _open_norm(
        self, states: Tensor, boundary: Tensor, in_open: Tensor, entered: Tensor, recalled: Tensor
    ) -> Tensor:
        """|S_open|^2 before every token [B, H, N, C], for the segments that `boundary` makes."""
        going_on = (~boundary).to(states.dtype)
        matched = (recalled * self.v).sum(-1) * going_on
        moments = _Moments(matched, recalled.square().sum(-1) * going_on, torch.zeros_like(matched))
        inside = ((self.fade * in_open) @ self.token.next_norm_gain(moments)[..., None])[..., 0]
        before = (2 * self.cum_before).exp() * states.square().sum((-1, -2))[..., None]
        return inside + entered[..., 0] * before

    def _open_product(
        self, states: Tensor, segment: Tensor, in_open: Tensor, entered: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """The map x_t [B,H,N,C,V] -> S_open(t) x_t [B,H,N,C,K], as S_open(t) = sum_i e^(G_(t-1)-G_i) k_i u_i^T +
        carried part."""
        cum = document_cumsum(self.token.log_decay, self.sees)
        spread = causal_decay(self.cum_before, cum, self.sees, strict=True) * in_open
        written = self.v
        if self.matrix is not None:
            own = self.matrix * (segment[..., :, None] == segment[..., None, :])
            first = (segment == 0).to(states.dtype)[..., None]
            written = own @ self.v - first * (erased_keys(self.k, cum, own) @ states)
        reach = entered * self.cum_before.exp()[..., None]

        def times(x: Tensor) -> Tensor:
            return (spread * (x @ written.transpose(-1, -2))) @ self.k + reach * (x @ states.transpose(-1, -2))

        return times


def _suffix_sum(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


def _closure(jump: Tensor) -> Tensor:
    """Tokens visited by following `jump` [.., C] (C = none) from every token, itself included: [.., C, C] bool."""
    size = jump.shape[-1]
    jump = torch.cat([jump, torch.full_like(jump[..., :1], size)], dim=-1)
    visited = torch.eye(size + 1, size, dtype=torch.bool, device=jump.device).expand(*jump.shape, size)
    steps = 1
    while steps < size:
        visited = visited | visited.gather(-2, jump[..., None].expand(visited.shape))
        jump = jump.gather(-1, jump)
        steps *= 2
    return visited[..., :size, :]
