"""What every operation checks and how it cuts its inputs: shapes, types, key-head groups and chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any input is (reference checks), else float32: states and decisions never run narrower."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_inputs(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, q: Tensor | None = None) -> None:
    """Raises ValueError naming the first shape that does not fit q, k [B,T,Hk,K], v [B,T,H,V] and gates [B,T,H]."""
    if k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"k has {k.dim()} and v {v.dim()} dimensions; both need 4: [batch, time, heads, dim]")
    batch, tokens, heads, _ = v.shape
    if tokens == 0:
        raise ValueError("the sequence is empty (T = 0); at least one token is needed")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} differ in batch or time")
    if heads % k.shape[2]:
        raise ValueError(f"v has {heads} heads, not a multiple of the {k.shape[2]} key heads")
    for name, gate in (("log_decay", log_decay), ("beta", beta)):
        if gate is not None and gate.shape != (batch, tokens, heads):
            raise ValueError(f"{name} has shape {tuple(gate.shape)}; it must be [B, T, H] = {(batch, tokens, heads)}")
    if q is not None and q.shape != k.shape:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must have one shape")


def per_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, Hk, D] -> [B, T, H, D]: head h reads key head h // (H // Hk)."""
    groups = x.shape[2]
    if groups == heads:
        return x
    if heads % groups:
        raise ValueError(f"{groups} key heads do not divide {heads} heads")
    return x.repeat_interleave(heads // groups, dim=2)


def heads_first(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, T, Hk, D] or [B, T, H] -> [B, H, T(, D)] in `dtype`, key heads spread over the heads that share them."""
    wide = per_head(x, heads) if x.dim() == 4 else x
    return wide.to(dtype).transpose(1, 2)


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, H, T, ...] -> [B, H, N, C, ...], zero-padded: a zero token neither decays, erases, writes nor is read."""
    tokens = x.shape[2]
    pad = -tokens % chunk
    if pad:
        x = F.pad(x, [0, 0] * (x.dim() - 3) + [0, pad])
    return x.unflatten(2, (-1, chunk))
