"""Drift scores and boundaries by all-pairs tables (docs/dla.md section 6).

If a segment opened at token a of a chunk, the score of token t needs p = S_[a,t)^T k_t only through p.v_t, |p|^2 and
|S|^2, and all three follow for every pair (a, t) at once from C x C products. So the next boundary after every
possible opening is known in parallel; what is sequential is one pass over chunks, which scores the segment that
entered open against its state. Tables are indexed [t, a], t the scored token. Scores are float32: every backend
compares the same rounded number with tau.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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

    size: Tensor
    """|k|^2 |v|^2."""
    decay: Tensor
    """e^g."""
    erase: Tensor
    write: Tensor
    gain_matched: Tensor
    """|S'|^2 - e^(2g) |S|^2 = gain_matched k^T S v - gain_recalled |S^T k|^2 + gain_written, with S' the next S."""
    gain_recalled: Tensor
    gain_written: Tensor

    @classmethod
    def of(cls, key_norm: Tensor, value_norm: Tensor, log_decay: Tensor, erase: Tensor, write: Tensor) -> _Token:
        """From |k|^2, |v|^2 and the gates, for S' = e^g (I - erase k k^T) S + write k v^T."""
        decay = log_decay.exp()
        return cls(
            size=key_norm * value_norm,
            decay=decay,
            erase=erase,
            write=write,
            gain_matched=2 * decay * write * (1 - erase * key_norm),
            gain_recalled=decay**2 * (2 * erase - erase**2 * key_norm),
            gain_written=write**2 * key_norm * value_norm,
        )

    def next_norm_gain(self, m: _Moments) -> Tensor:
        """|S'|^2 - e^(2g) |S|^2."""
        return self.gain_written + self.gain_matched * m.value_match - self.gain_recalled * m.recalled

    def columns(self) -> _Token:
        """The same with an axis more, to broadcast over openings."""
        return _Token(*(x[..., None] for x in self._tensors()))

    def per_chunk(self) -> list[_Token]:
        """One _Token [B, H, C] a chunk."""
        return [_Token(*parts) for parts in zip(*(x.unbind(2) for x in self._tensors()), strict=True)]

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in dataclasses.fields(self)]


def drift_from_cosine(cosine: Tensor) -> Tensor:
    """I = sqrt(2 - 2 cos), in [0, 2]."""
    return (2 - 2 * cosine).clamp_min(0).sqrt()


def _cosine(token: _Token, m: _Moments, drift: str) -> Tensor:
    """Cosine between S_open and the token's write, or the state after it; 0 where either is zero."""
    if drift == "token":
        inner, size = m.value_match, token.size * m.norm
    else:
        inner = token.decay * (m.norm - token.erase * m.recalled) + token.write * m.value_match
        size = (token.decay**2 * m.norm + token.next_norm_gain(m)) * m.norm
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
    state = scan.empty_state() if cache is None else open_state(cache).to(dtype)
    reached, table = scan.reachable_boundaries(tau, forced)
    first, carried, states = scan.enter_chunks(state, tau, forced, reached)
    boundary, score = _follow(first, carried, reached, table)
    score = score.masked_fill(forced, 0.0)

    def tokens_of(x: Tensor) -> Tensor:
        return x.flatten(2, 3)[:, :, :tokens]

    grads = None
    if gradients:
        grad_k, grad_v = scan.score_gradients(states, boundary)
        grads = (tokens_of(grad_k), tokens_of(grad_v))
    return Drift(tokens_of(score), tokens_of(boundary), grads)


def _document_heads(document_start: Tensor, chunk: int) -> Tensor:
    """[B, 1, N, C] bool: the token is its document's first."""
    index = torch.arange(document_start.shape[1], device=document_start.device)
    return to_chunks((document_start == index)[:, None], chunk)


def open_state(cache: MergeCache) -> Tensor:
    """The newest slot's state [B, H, K, V] (zero in an empty cache)."""
    index = (cache.fill - 1).clamp_min(0)[..., None, None, None]
    return cache.states.gather(2, index.expand(-1, -1, 1, *cache.states.shape[3:]))[:, :, 0]


class _Scan:
    """Tables of all chunks, and the pass over chunks that uses them."""

    def __init__(self, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, drift: str, sees: Tensor) -> None:
        self.k, self.v, self.drift, self.sees = k, v, drift, sees
        ones = torch.ones_like(log_decay)
        self.log_decay = log_decay
        self.erase = torch.zeros_like(ones) if beta is None else beta
        self.write = ones if beta is None else beta
        self.value_norm = v.square().sum(-1)
        self.token = _Token.of(k.square().sum(-1), self.value_norm, log_decay, self.erase, self.write)
        cum = document_cumsum(log_decay, sees)
        self.cum_before = cum - log_decay
        self.matrix = write_matrix(k, cum, beta, sees)
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
        """For every opening a: the boundaries its walk passes [B,H,N,a,t] bool; and float32 scores [B,H,N,t,a]."""
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
        recalled = _suffix_sum(self.recall * (2 * cross + self.recall * self.value_norm[..., None, :]))
        token = self.token.columns()
        moments = _Moments(matched, recalled, torch.zeros_like(matched))
        size = matched.shape[-1]
        opened = torch.ones(size, size, dtype=torch.bool, device=matched.device).tril()
        norm = self.fade @ (token.next_norm_gain(moments) * opened)
        return drift_from_cosine(_cosine(token, _Moments(matched, recalled, norm), self.drift)).float()

    def enter_chunks(
        self, state: Tensor, tau: Tensor, forced: Tensor, reached: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pass over the chunks, entered first with open state [B, H, K, V].

        Returns each chunk's first boundary [B, H, N] int64 (C: none), its tokens' scores against the state it is
        entered with [B, H, N, C] float32, and those states [B, H, N, K, V]. The rest follows from these without a loop.
        """
        size = reached.shape[-1]
        index = torch.arange(size, device=state.device)
        last = F.pad(torch.where(reached, index, -1).amax(-1), (0, 1), value=-1)
        faded = (2 * self.cum_before).exp()
        tables = (self.recalled_values, self.key_open, self.v, self.fade, faded, self.key_end, self.whole, forced, last)
        firsts, scores, states = [], [], []
        for token, parts in zip(self.token.per_chunk(), zip(*(x.unbind(2) for x in tables), strict=True), strict=True):
            recalled_values, key_open, v, fade, fades, key_end, whole, starts, lasts = parts
            states.append(state)
            recalled = recalled_values + key_open @ state
            matched, square = (recalled * v).sum(-1), recalled.square().sum(-1)
            gain = token.next_norm_gain(_Moments(matched, square, square))
            norm = fades * state.square().sum((-1, -2))[..., None] + (fade @ gain[..., None])[..., 0]
            score = drift_from_cosine(_cosine(token, _Moments(matched, square, norm), self.drift)).float()
            hit = F.pad((score >= tau) | starts, (0, 1), value=True)
            first = hit.to(torch.int8).argmax(-1)
            newest = lasts.gather(-1, first[..., None])
            kept = key_end * (index >= newest)[..., None]
            moved = apply_transition(whole, state[..., None, :, :])[..., 0, :, :]
            state = moved.masked_fill((newest >= 0)[..., None], 0.0) + kept.transpose(-1, -2) @ v
            firsts.append(first)
            scores.append(score)
        return torch.stack(firsts, 2), torch.stack(scores, 2), torch.stack(states, 2)

    def score_gradients(self, states: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor]:
        """d score / d k and d score / d v of every token [B,H,N,C,K|V], S_open constant.

        states [B,H,N,K,V] are those the chunks were entered with.
        """
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
            token = _Token.of(k.square().sum(-1), v.square().sum(-1), self.log_decay, self.erase, self.write)
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
        """The map x_t [B,H,N,C,V] -> S_open(t) x_t [B,H,N,C,K].

        S_open(t) = sum_i e^(G_(t-1)-G_i) k_i u_i^T, plus what is left of the state the chunk was entered with.
        """
        cum = document_cumsum(self.log_decay, self.sees)
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


def _follow(first: Tensor, carried: Tensor, reached: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Boundaries bool and scores float32 [B, H, N, C] of the walk that each chunk's first boundary [B, H, N] begins."""
    size = reached.shape[-1]
    index = torch.arange(size, device=reached.device)
    rows = F.pad(reached, (0, 0, 0, 1), value=False)
    boundary = rows.gather(-2, first[..., None, None].expand(*first.shape, 1, size))[..., 0, :]
    latest = torch.where(boundary, index, -1).cummax(-1).values
    before = F.pad(latest[..., :-1], (1, 0), value=-1)
    own = table.gather(-1, before.clamp_min(0)[..., None])[..., 0]
    return boundary, torch.where(before < 0, carried, own)


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
