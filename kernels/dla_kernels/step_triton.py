"""Triton kernels of the decode step: one token of docs/dla.md section 2 on the MergeCache, in place (step.py).

Two launches a layer and token. `step_decide`, a program a head: score, boundary and merge, everything of the cache but
its states, and a small record of what became of the slots. `step_update`, a program a tile of V: moves, transitions,
writes and reads the states by that record, so that a few heads with large states still fill a GPU. A decision needs
sums over the whole open state before any tile of it changes; one launch would leave a head to one program. The second
launch also counts the token, which the first may then read for every head.

Nothing is read back on the host and grids depend on shapes alone, so a CUDA graph can replay a step. Hence a full
log_linear cache raises nothing here: its two oldest slots join, as levels beyond the last are one.

Bytes of states per head and token, m slots in use: 4 K V (2 m + 1) with closed slots in transition, 4 K V (m + 2) with
closed slots frozen; a merge moves the newer slots, at most 4 K V m more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels import launch
from dla_kernels.memory.cache import MergeCache


@triton.jit
def _open_score(
    p_state, b_k, p_v, decay, beta, GATED: tl.constexpr, DRIFT: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Drift of one token against the open state, in the elementwise form of memory/reference.py: token_score."""
    o_k = tl.arange(0, BK)
    b_old = tl.zeros([BK, BV], tl.float32)
    b_new = tl.zeros([BK, BV], tl.float32)
    b_inner = tl.zeros([BK, BV], tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=3):  # one program streams a whole state: loads must run ahead
        o_v = i_v + tl.arange(0, BV)
        m = (o_k < K)[:, None] & (o_v < V)[None, :]
        b_v = tl.load(p_v + o_v, mask=o_v < V, other=0.0).to(tl.float32)
        b_s = tl.load(p_state + o_k[:, None] * V + o_v[None, :], mask=m, other=0.0)
        b_c = b_k[:, None] * b_v[None, :]
        if DRIFT == "update":
            b_c = beta * b_c + _transition(b_s, b_k, decay, beta, GATED)
        b_old += b_s * b_s
        b_new += b_c * b_c
        b_inner += b_c * b_s
    size = tl.sum(b_old) * tl.sum(b_new)
    cosine = tl.where(size > 0, tl.div_rn(tl.sum(b_inner), tl.sqrt_rn(tl.where(size > 0, size, 1.0))), 0.0)
    return tl.sqrt_rn(tl.maximum(2.0 - 2.0 * cosine, 0.0))


@triton.jit
def _transition(b_s, b_k, decay, beta, GATED: tl.constexpr):
    """e^g (I - beta k k^T) S for a tile of columns of S."""
    if GATED:
        b_s -= (beta * b_k)[:, None] * tl.sum(b_k[:, None] * b_s, 0)[None, :]
    return decay * b_s


@triton.jit
def _record_levels(p_source, p_counts, o_s, fill, position, S: tl.constexpr):
    """log_linear: record the first old slot of every new one; returns how many there are.

    A slot stays while its level holds; all newer ones join it. Past the last level the two oldest join.
    """
    m_s = o_s < fill
    b_counts = tl.load(p_counts + o_s, mask=m_s, other=0)
    b_start = position - (tl.sum(b_counts) - tl.cumsum(b_counts) + b_counts)
    m_stays = m_s & ((o_s == 0) | (b_start + (b_start & -b_start) > position))
    b_target = tl.cumsum(m_stays.to(tl.int32)) - 1
    groups = tl.sum(m_stays.to(tl.int32))
    excess = (groups == S).to(tl.int32)
    m_stays = m_stays & ((b_target == 0) | (b_target > excess))
    tl.store(p_source + tl.maximum(b_target - excess, 0), o_s, mask=m_stays)
    return groups - excess


@triton.jit
def _pair_to_merge(p_counts, p_scores, o_s, position, RULE: tl.constexpr, S: tl.constexpr):
    """Index of the adjacent pair that a full memory merges; ties fall to the oldest."""
    if RULE == "density" or RULE == "mass":
        m = o_s < S - 1
        b_cost = tl.load(p_scores + o_s, mask=m, other=0.0) + tl.load(p_scores + o_s + 1, mask=m, other=0.0)
        if RULE == "density":
            b_count = tl.load(p_counts + o_s, mask=m, other=0) + tl.load(p_counts + o_s + 1, mask=m, other=0)
            b_cost = b_cost / tl.maximum(b_count, 1).to(tl.float64)
        pair = tl.argmin(tl.where(m, b_cost, float("inf")), 0).to(tl.int64)
    elif RULE == "random":
        pair = (((position * 2654435761) & 4294967295) >> 12) % (S - 1)
    else:
        pair = position * 0
    return pair


@triton.jit
def _merge_key_sums(
    p_sums, p_rho, p_kappa, o_s, b_first, b_last, longest, newest,
    R: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Merge the slots' sums of routing keys and add this token's; returns rho . sum of every slot [BS]."""
    b_match = tl.zeros([BS], tl.float32)
    for i_r in range(0, R, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < R
        b_sum = tl.zeros([BS, BR], tl.float32)
        for i in range(longest):
            o_i = b_first + i
            b_sum += tl.load(
                p_sums + o_i[:, None] * R + o_r[None, :], mask=(o_i < b_last)[:, None] & m_r[None, :], other=0.0
            )  # fmt: skip
        if p_kappa is not None:
            b_key = tl.load(p_kappa + o_r, mask=m_r, other=0.0).to(tl.float32)
            b_sum += tl.where((o_s == newest)[:, None], b_key[None, :], 0.0)
            b_match += tl.sum(b_sum * tl.load(p_rho + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :], 1)
        tl.debug_barrier()
        tl.store(p_sums + o_s[:, None] * R + o_r[None, :], b_sum, mask=(o_s < S)[:, None] & m_r[None, :])
    return b_match


@triton.jit(do_not_specialize=["tau", "k_row", "v_row", "rho_row", "kappa_row", "interval", "H"])
def step_decide_kernel(
    p_k, p_v, p_log_decay, p_beta, p_read_weights, p_tau, p_rho, p_kappa, p_gain, p_sharpness,
    p_states, p_counts, p_scores, p_gates, p_fill, p_position, p_key_sums, p_source, p_weights,
    tau, k_row, v_row, rho_row, kappa_row, interval, H,
    K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    GROUP: tl.constexpr, RHO_GROUP: tl.constexpr, KAPPA_GROUP: tl.constexpr,
    POLICY: tl.constexpr, DRIFT: tl.constexpr, RULE: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Decide one token of one head. Grid: B * H.

    Writes counts, scores, gates, fill and key_sums in place; source [B, H, S+1] int32: new slot j holds the old slots
    source[j] .. source[j+1] - 1, and source[S] counts the old ones; weights [B, H, S]: read weight of every new slot.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    p_states += i_bh * (S * K * V)
    p_counts += i_bh * S
    p_scores += i_bh * S
    p_gates += i_bh * S
    p_source += i_bh * (S + 1)
    fill = tl.load(p_fill + i_bh)
    position = tl.load(p_position + i_b)
    o_s = tl.arange(0, BS)
    m_s = o_s < S

    boundary = position == 0
    if POLICY == "dla":
        b_k = tl.load(p_k + i_b * k_row + i_h // GROUP * K + tl.arange(0, BK), mask=tl.arange(0, BK) < K, other=0.0)
        beta = 1.0
        if p_beta is not None:
            beta = tl.load(p_beta + i_bh).to(tl.float32)
        score = _open_score(
            p_states + tl.maximum(fill - 1, 0) * (K * V), b_k.to(tl.float32), p_v + i_b * v_row + i_h * V,
            tl.exp(tl.load(p_log_decay + i_bh).to(tl.float32)), beta, p_beta is not None, DRIFT, K, V, BK, BV,
        )  # fmt: skip
        score = tl.where(boundary, 0.0, score)
        if p_tau is not None:
            tau = tl.load(p_tau + i_h)
        boundary = boundary | (score >= tau)
    elif POLICY == "fixed":
        boundary = position % interval == 0
    elif POLICY == "log_linear":
        boundary = position >= 0

    if POLICY == "log_linear":
        groups = _record_levels(p_source, p_counts, o_s, fill, position, S).to(tl.int64)
        tl.store(p_source + o_s, fill, mask=(o_s >= groups) & (o_s <= S))
    else:
        groups = fill
        b_source = o_s
        if S > 1:
            full = boundary & (fill == S)
            groups = fill - full.to(tl.int64)
            b_source = o_s + (full & (o_s > _pair_to_merge(p_counts, p_scores, o_s, position, RULE, S))).to(tl.int32)
        tl.store(p_source + o_s, tl.where(o_s < groups, b_source, fill), mask=o_s <= S)
    fill = tl.minimum(groups + boundary.to(tl.int64), S)
    newest = fill - 1

    tl.debug_barrier()
    b_first = tl.load(p_source + o_s, mask=m_s, other=0)
    b_last = tl.load(p_source + o_s + 1, mask=m_s, other=0)
    longest = tl.max(b_last - b_first)
    b_counts = tl.where(o_s == newest, 1, 0).to(tl.int64)
    b_scores = tl.zeros([BS], tl.float64)
    for i in range(longest):
        o_i = b_first + i
        b_counts += tl.load(p_counts + o_i, mask=o_i < b_last, other=0)
        b_scores += tl.load(p_scores + o_i, mask=o_i < b_last, other=0.0)
    if POLICY == "dla":
        b_scores += tl.where(o_s == newest, score.to(tl.float64), 0.0)
    b_gates = tl.load(p_gates + b_first, mask=b_first < b_last, other=1.0)
    tl.debug_barrier()
    tl.store(p_counts + o_s, b_counts, mask=m_s)
    tl.store(p_scores + o_s, b_scores, mask=m_s)
    tl.store(p_gates + o_s, b_gates, mask=m_s)
    tl.store(p_fill + i_bh, fill)

    m_live = o_s <= newest
    b_w = tl.load(p_read_weights + i_bh * S + newest - o_s, mask=m_live, other=0.0).to(tl.float32)
    if p_key_sums is not None:
        p_rho_row = p_rho
        p_kappa_row = p_kappa
        if p_rho is not None:
            p_rho_row = p_rho + i_b * rho_row + i_h // RHO_GROUP * R
            p_kappa_row = p_kappa + i_b * kappa_row + i_h // KAPPA_GROUP * R
        b_match = _merge_key_sums(
            p_key_sums + i_bh * (S * R), p_rho_row, p_kappa_row, o_s, b_first, b_last, longest, newest, R, S, BS, BR
        )
        if p_rho is not None:
            b_logit = tl.load(p_sharpness + i_h).to(tl.float32) * b_match / tl.maximum(b_counts, 1).to(tl.float32)
            top = tl.maximum(tl.max(tl.where(m_live, b_logit, float("-inf"))), 0.0)
            b_share = tl.where(m_live, tl.exp(tl.where(m_live, b_logit - top, 0.0)), 0.0)
            b_w += tl.load(p_gain + i_h).to(tl.float32) * b_share / (tl.sum(b_share) + tl.exp(-top))
    tl.store(p_weights + i_bh * S + o_s, b_w, mask=m_s)


@triton.jit(do_not_specialize=["scale", "q_row", "k_row", "v_row", "H"])
def step_update_kernel(
    p_q, p_k, p_v, p_log_decay, p_beta, p_source, p_weights, p_states, p_fill, p_position, p_o,
    scale, q_row, k_row, v_row, H,
    K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, GROUP: tl.constexpr, FROZEN: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carry out one decided token on a tile of V of one head's states, and read it. Grid: B * H * tiles of V.

    Slots are taken from oldest to newest and never move towards the newer end, so a slot is overwritten only when it
    has been read: the next one is loaded ahead.
    """
    i_p = tl.program_id(0).to(tl.int64)
    i_v = i_p % tl.cdiv(V, BV)
    i_bh = i_p // tl.cdiv(V, BV)
    i_b = i_bh // H
    i_h = i_bh % H
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m = m_k[:, None] & m_v[None, :]
    p_tile = p_states + i_bh * (S * K * V) + o_k[:, None] * V + o_v[None, :]
    p_source += i_bh * (S + 1)

    b_q = tl.load(p_q + i_b * q_row + i_h // GROUP * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + i_b * k_row + i_h // GROUP * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + i_b * v_row + i_h * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(p_log_decay + i_bh).to(tl.float32))
    beta = 1.0
    if p_beta is not None:
        beta = tl.load(p_beta + i_bh).to(tl.float32)
    fill = tl.load(p_fill + i_bh)
    before = tl.load(p_source + S)
    last = tl.load(p_source)
    b_ahead = tl.load(p_tile + tl.cast(last, tl.int64) * (K * V), mask=m & (last < before), other=0.0)
    b_read = tl.zeros([BK, BV], tl.float32)
    for j in range(tl.maximum(fill, before)):
        i_j = tl.cast(j, tl.int64)
        first = last
        last = tl.load(p_source + i_j + 1)
        b_s = b_ahead
        b_ahead = tl.load(p_tile + tl.cast(last, tl.int64) * (K * V), mask=m & (last < before), other=0.0)
        for i in range(first + 1, last):
            b_s += tl.load(p_tile + tl.cast(i, tl.int64) * (K * V), mask=m, other=0.0)
        is_open = i_j == fill - 1
        if FROZEN:
            if is_open:
                b_s = _transition(b_s, b_k, decay, beta, p_beta is not None)
        else:
            b_s = _transition(b_s, b_k, decay, beta, p_beta is not None)
        if is_open:
            b_s += beta * b_k[:, None] * b_v[None, :]
        tl.debug_barrier()
        if FROZEN:
            if is_open | (first != i_j) | (last != i_j + 1):
                tl.store(p_tile + i_j * (K * V), b_s, mask=m)
        else:
            tl.store(p_tile + i_j * (K * V), b_s, mask=m)
        b_read += tl.load(p_weights + i_bh * S + i_j) * b_s
    b_o = scale * tl.sum(b_q[:, None] * b_read, 0)
    tl.store(p_o + i_bh * V + o_v, b_o, mask=m_v)
    if (i_h == 0) & (i_v == 0):
        tl.store(p_position + i_b, tl.load(p_position + i_b) + 1)


@dataclass(frozen=True)
class StepOptions:
    """How a token is decided and read: the checked arguments of dla_step by their names."""

    tau: Tensor | float
    policy: str
    drift: str
    capacity_rule: str
    interval: int
    frozen: bool
    scale: float


@dataclass(frozen=True)
class _Token:
    """One token of every sequence, each sequence's rows dense."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None


@launch.eager
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    read_weights: Tensor,
    cache: MergeCache,
    options: StepOptions,
    routing: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """o [B, H, V] in v's dtype; `cache` is updated in place. Raises ValueError on shapes that do not fit."""
    _check_shapes(q, k, v, log_decay, beta, read_weights, cache, options.tau, routing)
    q, k, v = (_dense_rows(x) for x in (q, k, v))
    token = _Token(q, k, v, log_decay.contiguous(), None if beta is None else beta.contiguous())
    source, weights = _decide(token, read_weights.contiguous(), cache, options, routing)
    return _update(token, source, weights, cache, options)


def _decide(
    token: _Token,
    read_weights: Tensor,
    cache: MergeCache,
    options: StepOptions,
    routing: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Boundary and merge of every list: which old slots each slot is made of from now on, and its read weight."""
    k, v = token.k, token.v
    rho, kappa, gain, sharpness = (None,) * 4 if routing is None else routing
    rho, kappa = (None if x is None else _dense_rows(x) for x in (rho, kappa))
    batch, heads, slots = cache.counts.shape
    tau = options.tau.to(torch.float32).expand(heads).contiguous() if isinstance(options.tau, Tensor) else None
    source = torch.empty(batch, heads, slots + 1, dtype=torch.int32, device=v.device)
    weights = torch.empty(batch, heads, slots, dtype=torch.float32, device=v.device)
    launch.launch(
        step_decide_kernel,
        (batch * heads,),
        *(k, v, token.log_decay, token.beta, read_weights, tau, rho, kappa),
        *(None if x is None else x.contiguous() for x in (gain, sharpness)),
        *(cache.states, cache.counts, cache.scores, cache.gates, cache.fill, cache.position, cache.key_sums),
        *(source, weights, 0.0 if isinstance(options.tau, Tensor) else float(options.tau)),
        *(0 if x is None else x.stride(0) for x in (k, v, rho, kappa)),
        *(options.interval, heads),
        R=1 if cache.key_sums is None else cache.key_sums.shape[-1],
        RHO_GROUP=1 if rho is None else heads // rho.shape[1],
        KAPPA_GROUP=1 if kappa is None else heads // kappa.shape[1],
        # One slot never opens another; a fixed partition has equal scores, so its capacity rule is the oldest pair.
        POLICY=options.policy if slots > 1 else "single",
        DRIFT=options.drift,
        RULE="oldest" if options.policy == "fixed" else options.capacity_rule,
        BS=launch.power_of_2(slots + 1, 16),
        **_sizes(token, cache, "step_decide"),
    )
    return source, weights


def _update(token: _Token, source: Tensor, weights: Tensor, cache: MergeCache, options: StepOptions) -> Tensor:
    """Merge, transition, write and read every slot: o [B, H, V]."""
    q, k, v = token.q, token.k, token.v
    batch, heads, value_dim = v.shape
    o = torch.empty(batch, heads, value_dim, dtype=v.dtype, device=v.device)
    sizes = _sizes(token, cache, "step_update")
    launch.launch(
        step_update_kernel,
        (batch * heads * launch.cdiv(value_dim, sizes["BV"]),),
        *(q, k, v, token.log_decay, token.beta, source, weights, cache.states, cache.fill, cache.position, o),
        *(float(options.scale), q.stride(0), k.stride(0), v.stride(0), heads),
        FROZEN=options.frozen,
        **sizes,
    )
    return o


def _sizes(token: _Token, cache: MergeCache, kernel: str) -> dict[str, int]:
    """Constants that both kernels are compiled for, and a kernel's launch settings."""
    _, heads, slots, key_dim, value_dim = cache.states.shape
    settings = launch.tuning(kernel, token.v.device)
    settings["BV"] = min(launch.power_of_2(value_dim, 16), settings["BV"])
    group = heads // token.k.shape[1]
    return {"K": key_dim, "V": value_dim, "S": slots, "GROUP": group, "BK": launch.power_of_2(key_dim, 16), **settings}


def _dense_rows(x: Tensor) -> Tensor:
    """`x` [B, H, D] itself where every sequence's [H, D] is contiguous, as in a slice of a projection, else a copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    read_weights: Tensor,
    cache: MergeCache,
    tau: Tensor | float,
    routing: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> None:
    """A kernel would read and write past what is too small, where torch raises by itself."""
    batch, heads, slots, key_dim, value_dim = cache.states.shape
    keys = (batch, k.shape[1], key_dim)
    expected = [
        ("q", q, keys),
        ("k", k, keys),
        ("v", v, (batch, heads, value_dim)),
        ("log_decay", log_decay, (batch, heads)),
        ("beta", beta, (batch, heads)),
        ("read_weights", read_weights, (batch, heads, slots)),
        ("cache.counts", cache.counts, (batch, heads, slots)),
        ("cache.scores", cache.scores, (batch, heads, slots)),
        ("cache.gates", cache.gates, (batch, heads, slots)),
        ("cache.fill", cache.fill, (batch, heads)),
        ("cache.position", cache.position, (batch,)),
    ]
    grouped = [k]
    if routing is not None and cache.key_sums is not None:
        rho, kappa, gain, sharpness = routing
        dim = cache.key_sums.shape[-1]
        grouped += [rho, kappa]
        expected += [
            ("rho", rho, (batch, rho.shape[1], dim)),
            ("kappa", kappa, (batch, kappa.shape[1], dim)),
            ("gain", gain, (heads,)),
            ("sharpness", sharpness, (heads,)),
        ]
    if cache.key_sums is not None:
        expected.append(("cache.key_sums", cache.key_sums, (batch, heads, slots, cache.key_sums.shape[-1])))
    if isinstance(tau, Tensor) and tau.dim():
        expected.append(("tau", tau, (heads,)))
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be {shape}, by the cache's B, H, S, K and V")
    for x in grouped:
        if heads % x.shape[1]:
            raise ValueError(f"{x.shape[1]} key heads do not divide {heads} heads")
    for name, tensor in vars(cache).items():
        if name != "conv" and tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"cache.{name} is not contiguous; a step writes it in place, so give it a cache of its own"
            )
