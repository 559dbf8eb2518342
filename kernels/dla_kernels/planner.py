"""plan_memory: from keys, values and gates to a MemoryPlan; the one place that knows the policies by name.

A policy says where boundaries lie and which die; `fixed` and `dla` share the capacity rule. A new policy is a function
here and a line in `POLICIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_kernels.documents import document_starts
from dla_kernels.inputs import check_inputs
from dla_kernels.launch import default_chunk_size, resolve_backend
from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.drift import DRIFTS, Drift, chunk_drift
from dla_kernels.memory.merging import CAPACITY_RULES, Merges, capacity_merges
from dla_kernels.memory.reference import recurrent_drift, recurrent_merges
from dla_kernels.plan import NEVER, MemoryPlan

POLICIES = ("single", "log_linear", "fixed", "dla")


@dataclass(frozen=True)
class _Request:
    """The checked arguments of one plan_memory call."""

    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None
    tau: Tensor
    capacity: int
    drift: str
    rule: str
    interval: int
    cache: MergeCache | None
    chunk: int
    backend: str
    score_gradients: bool
    document_start: Tensor
    one_document: bool
    """Whether every row is one whole document."""

    @property
    def positions(self) -> Tensor:
        """[B, 1, T] int64 within the document."""
        return (torch.arange(self.v.shape[1], device=self.v.device) - self.document_start)[:, None]


@torch.no_grad()
def plan_memory(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None = None,
    *,
    tau: Tensor | float,
    capacity: int,
    policy: str = "dla",
    drift: str = "token",
    capacity_rule: str = "density",
    interval: int = 64,
    cu_seqlens: Tensor | None = None,
    cache: MergeCache | None = None,
    chunk_size: int | None = None,
    score_gradients: bool = False,
    backend: str | None = None,
) -> MemoryPlan:
    """Decide which slots exist at every token (arXiv 2606.10650; docs/dla.md sections 2, 3 and 6). No gradients.

    k [B,T,Hk,K], v [B,T,H,V]; log_decay, beta [B,T,H] (beta None: mamba2); tau a float or [H]; capacity K slots;
    capacity_rule which pair a full memory merges: `density` (the paper's), `mass`, `oldest` or `random` (docs/dla.md
    section 2.3); `interval` tokens between boundaries of policy `fixed`; cu_seqlens [M+1] offsets of packed documents
    into the flattened B*T tokens; with `cache` the first document of each row goes on from it. With capacity 1,
    boundaries would do nothing and are not made. score_gradients keeps what `boundary_score` needs. Raises ValueError
    on shapes, names or a context beyond the policy's reach.
    """
    check_inputs(k, v, log_decay, beta)
    check_choices(policy, drift, capacity_rule, capacity, interval)
    batch, tokens, heads, _ = v.shape
    device = v.device
    request = _Request(
        k=k,
        v=v,
        log_decay=log_decay,
        beta=beta,
        tau=_threshold(tau, heads, device),
        capacity=capacity,
        drift=drift,
        rule=capacity_rule,
        interval=interval,
        cache=cache,
        chunk=chunk_size or default_chunk_size(device, k.shape[-1]),
        backend=resolve_backend(backend, v, k),
        score_gradients=score_gradients,
        document_start=document_starts(
            cu_seqlens, batch, tokens, position=None if cache is None else cache.position, device=device
        ),
        one_document=cu_seqlens is None and cache is None,
    )
    _check_cache(request, heads)
    found = _POLICY_DRIFT["single" if capacity == 1 else policy](request)
    carried = _carried(cache, batch, heads, capacity, device)
    if policy == "log_linear" and capacity > 1:
        merges = _fenwick_merges(request, carried)
    else:
        merges = _merging(request.backend)(
            found.boundary,
            found.score,
            request.document_start,
            capacity=capacity,
            rule="oldest" if policy == "fixed" else capacity_rule,
            carried_start=carried[0],
            carried_scores=carried[1],
            carried_fill=carried[2],
        )
    return MemoryPlan(
        score=found.score.transpose(1, 2),
        boundary=found.boundary.transpose(1, 2),
        merged=merges.merged.transpose(1, 2),
        death=merges.death.transpose(1, 2),
        document_start=request.document_start,
        capacity=capacity,
        chunk=request.chunk,
        carried_start=carried[0],
        carried_death=merges.carried_death,
        carried_fill=carried[2],
        score_gradients=None if found.gradients is None else _kept_gradients(found, request),
    )


def _kept_gradients(found: Drift, request: _Request) -> tuple[Tensor, Tensor]:
    """[B,T,H,K] and [B,T,H,V] in the inputs' dtypes, for they are kept until the backward pass; 0 but at boundaries
    that a score decided, which a document's first is not."""
    assert found.gradients is not None
    decided = found.boundary & (request.positions > 0)
    to_k, to_v = (g.masked_fill_(~decided[..., None], 0.0).transpose(1, 2) for g in found.gradients)
    return to_k.to(request.k.dtype), to_v.to(request.v.dtype)


def _threshold(tau: Tensor | float, heads: int, device: torch.device) -> Tensor:
    """tau as [H] float32; a number is filled in on the device, since a copy would wait for it."""
    if isinstance(tau, Tensor):
        return tau.to(device=device, dtype=torch.float32).expand(heads)
    return torch.full((heads,), float(tau), dtype=torch.float32, device=device)


def _merging(backend: str) -> Callable[..., Merges]:
    """The capacity rule of a backend."""
    if backend == "recurrent":
        return recurrent_merges
    if backend == "torch":
        return capacity_merges
    from dla_kernels.memory.merging_triton import capacity_merges_triton

    return capacity_merges_triton


def _drift(backend: str) -> Callable[..., Drift]:
    """The chunkwise planner of a backend."""
    if backend == "torch":
        return chunk_drift
    from dla_kernels.memory.drift_triton import chunk_drift_triton

    return chunk_drift_triton


def check_choices(policy: str, drift: str, rule: str, capacity: int, interval: int) -> None:
    """Raises ValueError naming the first option of a memory policy that does not exist."""
    for name, value, choices in (
        ("policy", policy, POLICIES),
        ("drift", drift, DRIFTS),
        ("capacity_rule", rule, CAPACITY_RULES),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
    if capacity < 1:
        raise ValueError(f"capacity={capacity} must be at least 1 slot")
    if interval < 1:
        raise ValueError(f"interval={interval} must be at least 1 token")


def _check_cache(request: _Request, heads: int) -> None:
    cache = request.cache
    if cache is None:
        return
    expected = (request.v.shape[0], heads, request.capacity, request.k.shape[-1], request.v.shape[-1])
    if tuple(cache.states.shape) != expected:
        raise ValueError(
            f"the cache holds states {tuple(cache.states.shape)}; these inputs need [B, H, S, K, V] = {expected}"
        )


def _document_heads(request: _Request) -> Tensor:
    heads = request.v.shape[2]
    return (request.positions == 0).expand(-1, heads, -1)


def _unscored(request: _Request, boundary: Tensor) -> Drift:
    score = torch.zeros(boundary.shape, dtype=torch.float32, device=boundary.device)
    return Drift(score, boundary | _document_heads(request), None)


def _single(request: _Request) -> Drift:
    return _unscored(request, _document_heads(request))


def _fixed(request: _Request) -> Drift:
    return _unscored(request, (request.positions % request.interval == 0).expand(-1, request.v.shape[2], -1))


def _every_token(request: _Request) -> Drift:
    return _unscored(request, torch.ones_like(_document_heads(request)))


def _dla(request: _Request) -> Drift:
    r = request
    if r.backend == "recurrent":
        found = recurrent_drift(
            r.k, r.v, r.log_decay, r.beta, r.document_start, tau=r.tau, drift=r.drift, cache=r.cache
        )
        if not r.score_gradients:
            return found
        return Drift(found.score, found.boundary, _recurrent_score_gradients(r))
    return _drift(r.backend)(
        r.k,
        r.v,
        r.log_decay,
        r.beta,
        r.document_start,
        tau=r.tau,
        drift=r.drift,
        cache=r.cache,
        chunk=r.chunk,
        gradients=r.score_gradients,
    )


def _recurrent_score_gradients(r: _Request) -> tuple[Tensor, Tensor]:
    """Per-head score gradients by autograd through the token loop."""
    with torch.enable_grad():
        k = r.k.detach().repeat_interleave(r.v.shape[2] // r.k.shape[2], dim=2).requires_grad_()
        v = r.v.detach().clone().requires_grad_()
        score = recurrent_drift(
            k, v, r.log_decay, r.beta, r.document_start, tau=r.tau, drift=r.drift, cache=r.cache
        ).score
        grad_k, grad_v = torch.autograd.grad(score.sum(), (k, v))
    return grad_k.nan_to_num(0.0).transpose(1, 2), grad_v.nan_to_num(0.0).transpose(1, 2)


_POLICY_DRIFT = {"single": _single, "log_linear": _every_token, "fixed": _fixed, "dla": _dla}


def _carried(
    cache: MergeCache | None, batch: int, heads: int, capacity: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(starts [B,H,S], score sums [B,H,S], fill [B,H]) of the slots a call begins with."""
    if cache is None:
        zeros = torch.zeros(batch, heads, capacity, dtype=torch.int64, device=device)
        return zeros, zeros.double(), zeros[..., 0]
    return cache.slot_starts(), cache.scores, cache.fill


def _longest_document(request: _Request) -> int:
    """Tokens of the longest document; reads the device, unless shapes tell."""
    if request.one_document:
        return request.v.shape[1]
    return 0 if request.v.is_meta else int(request.positions.max()) + 1


def _fenwick_merges(request: _Request, carried: tuple[Tensor, Tensor, Tensor]) -> Merges:
    """log_linear: the boundary at position a > 0 dies at a + (lowest set bit of a), where its level carries over."""
    positions = request.positions
    most = 2 ** (request.capacity - 1)
    longest = _longest_document(request)
    if longest > most:
        raise ValueError(
            f"capacity={request.capacity} holds a log_linear memory of {most} tokens, the document has {longest}; "
            f"choose capacity >= {longest.bit_length() + 1}"
        )
    heads = request.v.shape[2]
    index = torch.arange(request.v.shape[1], device=positions.device)
    death = torch.where(positions > 0, index + (positions & -positions), NEVER).expand(-1, heads, -1)
    seen = (
        torch.zeros_like(carried[2]) if request.cache is None else request.cache.position[:, None].expand_as(carried[2])
    )
    opened = carried[0] + seen[..., None]
    carried_death = torch.where(opened > 0, carried[0] + (opened & -opened), NEVER)
    tokens = request.v.shape[1]
    death, carried_death = (torch.where(d < tokens, d, NEVER) for d in (death, carried_death))
    return Merges(death, carried_death, torch.full_like(death, -1))
