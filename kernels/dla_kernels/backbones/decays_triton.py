# mypy: disable-error-code="no-untyped-def"
"""Cumulative log-decays of chunks in Triton, and what other kernels of a backbone make of them (docs/dla.md section 5).

Every entry of the chunk operators is e^(G_r - G_w) times something that no decay enters, G being the cumulative
log-decay, w the writing token and r the token at which the entry is read: the reading token itself, or the end of w's
segment where closed slots are frozen and that comes first. So the gradient of log_decay needs, of any operator X, only
dX * X summed by r and by w, whatever the backbone; `decays_backward` takes these sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.launch import cdiv, launch, power_of_2, tuning


@dataclass(frozen=True)
class ChunkDecays:
    """Log-decays of chunks as [B, H, N, C] float32; padding continues the last token."""

    cum: Tensor
    """G: since the chunk's or the token's document's start."""
    left: Tensor
    """What a token's write has still to decay: to the chunk's end (-inf if another document comes first) or, where
    closed slots are frozen, to its segment's."""
    segment: Tensor | None
    """int32: boundaries in the chunk up to the token, itself included; None unless closed slots are frozen."""
    decay: Tensor
    """[B, H, N]: e^G of the chunk's end, or, frozen, of the end of the segment that entered open (1 if none did)."""


@dataclass(frozen=True)
class DecayAdjoints:
    """What decays a chunk's operators gives ChunkDecays, float32: of each operator, gradient times operator, summed."""

    cum: Tensor | None
    """[B, H, N, C]: by the token it is read at less by the token that wrote it, where neither is below; None: zero."""
    end: Tensor | None
    """[B, H, N, C]: by the writing token, where it is read after its segment; None: zero."""
    read: Tensor
    """[X, B, H, N, C], to be summed over X: of what `read_decay` scales."""
    key: Tensor
    """[X, B, H, N, C], to be summed over X: of what `end_decay` scales."""


@triton.jit
def visible(p_start, i_n, T, C: tl.constexpr):
    """[C, C] bool: token i of chunk i_n sees token j: no later one, and none of an earlier document."""
    o_c = tl.arange(0, C)
    b_start = (tl.load(p_start + tl.minimum(i_n * C + o_c, T - 1)) - i_n * C).to(tl.int32)
    return (o_c[:, None] >= o_c[None, :]) & (o_c[None, :] >= b_start[:, None])


@triton.jit
def decay_table(p_cum, p_left, p_segment, i_c, m_sees, C: tl.constexpr):
    """e^(G_r - G_j) [C, C] of chunk i_c, r where i reads j's write; 0 where i does not see j (m_sees)."""
    o_c = i_c * C + tl.arange(0, C)
    b_cum = tl.load(p_cum + o_c)
    b_log = b_cum[:, None] - b_cum[None, :]
    if p_segment is not None:
        b_log = tl.where(same_segment(p_segment, i_c, C), b_log, tl.load(p_left + o_c)[None, :])
    return tl.where(m_sees, tl.exp(tl.where(m_sees, b_log, 0.0)), 0.0)


@triton.jit
def same_segment(p_segment, i_c, C: tl.constexpr):
    """[C, C] bool: tokens i and j of chunk i_c belong to one segment; without segments all do."""
    if p_segment is None:
        return tl.full([C, C], True, tl.int1)
    else:
        b_segment = tl.load(p_segment + i_c * C + tl.arange(0, C))
        return b_segment[:, None] == b_segment[None, :]


@triton.jit
def entered_open(p_segment, i_c, C: tl.constexpr):
    """[C] float32: 1 for tokens of the segment that entered chunk i_c open, else 0; without segments all 1."""
    if p_segment is None:
        return tl.full([C], 1.0, tl.float32)
    else:
        return tl.where(tl.load(p_segment + i_c * C + tl.arange(0, C)) == 0, 1.0, 0.0)


@triton.jit
def start_decay(p_cum, i_c, C: tl.constexpr):
    """[C] float32: e^G of chunk i_c."""
    return tl.exp(tl.load(p_cum + i_c * C + tl.arange(0, C)))


@triton.jit
def read_decay(p_cum, p_segment, p_decay, i_c, C: tl.constexpr):
    """[C] float32: what the state that entered chunk i_c (open, if there are segments) has decayed to at each token."""
    b_decay = start_decay(p_cum, i_c, C)
    if p_segment is not None:
        b_decay = tl.maximum(b_decay, tl.load(p_decay + i_c))
    return b_decay


@triton.jit
def end_decay(p_left, i_c, C: tl.constexpr):
    """[C] float32: what is left of each token's write when chunk i_c, or its segment, ends."""
    return tl.exp(tl.load(p_left + i_c * C + tl.arange(0, C)))


@triton.jit
def _join(a, a_resets, b, b_resets):
    return tl.where(b_resets > 0, b, a + b), a_resets | b_resets


@triton.jit
def _sum_since(b, resets):
    """Running sum [C] that starts anew where `resets` (int32) is 1: what came before cannot change its rounding."""
    b_sum, _ = tl.associative_scan((b, resets), 0, _join)
    return b_sum


@triton.jit(do_not_specialize=["T", "H", "N"])
def chunk_decays_kernel(
    p_log_decay, p_start, p_boundary, p_cum, p_left, p_segment, p_decay, T, H, N,
    C: tl.constexpr,
):  # fmt: skip
    """The four tensors of ChunkDecays, one chunk and head a program."""
    i_p = tl.program_id(0).to(tl.int64)
    i_h = i_p % H
    i_n = (i_p // H) % N
    i_b = i_p // H // N
    i_o = (i_b * H + i_h) * N + i_n
    o_c = tl.arange(0, C)
    o_t = i_n * C + o_c
    p_g = p_log_decay + i_b * T * H + i_h
    p_start += i_b * T
    b_g = tl.load(p_g + o_t * H, mask=o_t < T, other=0.0).to(tl.float32)
    b_cum = _sum_since(b_g, (tl.load(p_start + tl.minimum(o_t, T - 1)) == o_t).to(tl.int32))
    tl.store(p_cum + i_o * C + o_c, b_cum)

    # Backwards from the chunk's last token, each with the log-decay of the one after it.
    o_r = C - 1 - o_c
    o_t = i_n * C + o_r
    m_next = (o_r < C - 1) & (o_t + 1 < T)
    b_g_next = tl.load(p_g + (o_t + 1) * H, mask=m_next, other=0.0).to(tl.float32)
    if p_boundary is None:
        b_log = tl.sum(tl.where(o_c == C - 1, b_cum, 0.0), 0)
        b_ends = tl.load(p_start + o_t + 1, mask=m_next, other=-1) == o_t + 1
        b_left = _sum_since(tl.where(b_ends, 0.0, b_g_next), b_ends.to(tl.int32))
        b_last_start = tl.load(p_start + tl.minimum(i_n * C + C - 1, T - 1))
        b_left = tl.where(o_t >= b_last_start, b_left, float("-inf"))
    else:
        o_g = i_b * T * H + i_h
        b_opens = tl.load(p_boundary + o_g + (i_n * C + o_c) * H, mask=i_n * C + o_c < T, other=0).to(tl.int32)
        b_segment = tl.cumsum(b_opens, 0)
        tl.store(p_segment + i_o * C + o_c, b_segment)
        b_log = tl.sum(tl.where(b_segment == 0, b_g, 0.0), 0)
        b_ends = tl.load(p_boundary + o_g + (o_t + 1) * H, mask=m_next, other=0).to(tl.int32)
        b_left = _sum_since(tl.where(b_ends > 0, 0.0, b_g_next), b_ends)
    tl.store(p_left + i_o * C + o_r, b_left)
    tl.store(p_decay + i_o, tl.exp(b_log))


@triton.jit
def _sum_of(p, o, PARTS: tl.constexpr, ENTRIES, C: tl.constexpr):
    """[C] float32: the sum of PARTS tensors of ENTRIES entries at o; 0 of none."""
    b_sum = tl.zeros([C], tl.float32)
    if p is not None:
        for i in tl.static_range(PARTS):
            b_sum += tl.load(p + o + i * ENTRIES)
    return b_sum


@triton.jit(do_not_specialize=["T", "H", "N", "ENTRIES"])
def decays_backward_kernel(
    p_start, p_boundary, p_segment, p_decay, p_d_cum, p_d_end, p_d_read, p_d_key, p_d_decay, p_d_log_decay,
    T, H, N, ENTRIES, READS: tl.constexpr, KEYS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """d log_decay [B, T, H], one chunk and head a program; ENTRIES: B * H * N * C."""
    i_p = tl.program_id(0).to(tl.int64)
    i_h = i_p % H
    i_n = (i_p // H) % N
    i_b = i_p // H // N
    i_o = (i_b * H + i_h) * N + i_n
    entries = tl.cast(ENTRIES, tl.int64)
    o_c = tl.arange(0, C)
    o_t = i_n * C + o_c
    o_g = (i_b * T + o_t) * H + i_h
    b_read = _sum_of(p_d_read, i_o * C + o_c, READS, entries, C)
    b_key = _sum_of(p_d_key, i_o * C + o_c, KEYS, entries, C)
    m_last = o_c == C - 1
    if p_boundary is not None:
        m_next = (o_c < C - 1) & (o_t + 1 < T)
        m_last = m_last | (tl.load(p_boundary + o_g + H, mask=m_next, other=0).to(tl.int32) > 0)
    # What the last token writes does not decay: its two shares would cancel but for their rounding.
    b_key = tl.where(m_last, 0.0, b_key)
    b_cum = _sum_of(p_d_cum, i_o * C + o_c, 1, entries, C) - b_key
    b_end = _sum_of(p_d_end, i_o * C + o_c, 1, entries, C) + b_key
    b_whole = 0.0
    if p_d_decay is not None:
        b_whole = tl.load(p_d_decay + i_o) * tl.load(p_decay + i_o)
    if p_segment is None:
        b_cum += b_read + tl.where(m_last, tl.sum(b_end, 0) + b_whole, 0.0)
    else:
        m_open = tl.load(p_segment + i_o * C + o_c) == 0
        b_whole += tl.sum(tl.where(m_open, 0.0, b_read), 0)
        b_opens = tl.load(p_boundary + o_g, mask=o_t < T, other=0).to(tl.int32)
        b_end = _sum_since(b_end, b_opens) + tl.where(m_open, b_whole, 0.0)
        b_cum += tl.where(m_open, b_read, 0.0) + tl.where(m_last, b_end, 0.0)
    m_sees = visible(p_start + i_b * T, i_n, T, C)
    b_d = tl.sum(tl.where(m_sees, b_cum[:, None], 0.0), 0)
    tl.store(p_d_log_decay + o_g, b_d.to(p_d_log_decay.dtype.element_ty), mask=o_t < T)


def settings_of(kernel: str, device: torch.device, chunk: int, key_dim: int) -> dict[str, int]:
    """Pinned settings of a kernel for this chunk size and K: no wider tile than K, at least 8 warps for C = 128."""
    settings = tuning(kernel, device)
    return settings | {
        "BK": min(power_of_2(key_dim, 16), settings["BK"]),
        "num_warps": max(settings["num_warps"], chunk // 16),
    }


def chunk_decays(log_decay: Tensor, document_start: Tensor, chunk: int, *, boundary: Tensor | None) -> ChunkDecays:
    """Of log_decay [B,T,H] and document_start [B,T] int32; boundary [B,T,H] bool where closed slots are frozen."""
    batch, tokens, heads = log_decay.shape
    chunks = cdiv(tokens, chunk)
    cum = log_decay.new_empty(batch, heads, chunks, chunk, dtype=torch.float32)
    left, decay = torch.empty_like(cum), cum.new_empty(batch, heads, chunks)
    segment = None if boundary is None else torch.empty_like(cum, dtype=torch.int32)
    launch(
        chunk_decays_kernel, (batch * chunks * heads,),
        log_decay, document_start, boundary, cum, left, segment, decay, tokens, heads, chunks,
        C=chunk, **tuning("chunk_decays", log_decay.device),
    )  # fmt: skip
    return ChunkDecays(cum, left, segment, decay)


def decays_backward(
    decays: ChunkDecays,
    log_decay: Tensor,
    document_start: Tensor,
    boundary: Tensor | None,
    adjoints: DecayAdjoints,
    d_decay: Tensor | None,
) -> Tensor:
    """d log_decay, shaped and typed like log_decay [B,T,H]; d_decay [B,H,N] float32 is the gradient of decays.decay."""
    batch, heads, chunks, chunk = decays.cum.shape
    out = torch.empty_like(log_decay)
    launch(
        decays_backward_kernel, (batch * chunks * heads,),
        document_start, boundary, decays.segment, decays.decay, adjoints.cum, adjoints.end, adjoints.read,
        adjoints.key, d_decay, out, log_decay.shape[1], heads, chunks, decays.cum.numel(),
        READS=adjoints.read.shape[0], KEYS=adjoints.key.shape[0], C=chunk,
        **tuning("decays_backward", log_decay.device),
    )  # fmt: skip
    return out
