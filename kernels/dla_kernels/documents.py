"""Packed documents: from `cu_seqlens` to the first token and the position of every token.

A document start empties the memory (docs/dla.md, section 8). Row edges are always document edges; with a carried cache
the first document of a row goes on from that cache, so its start lies before the row (a negative index).
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_accepted: tuple[weakref.ref[Tensor], int, int] | None = None
"""The offsets last found right on an accelerator, their version and B*T: every layer of a model is given the same ones,
and to look at their values is to wait for the device."""


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, tokens: int) -> None:
    """Raises ValueError unless `cu_seqlens` [M+1] rises strictly from 0 to B*T. Waits for an accelerator once."""
    total = batch * tokens
    if cu_seqlens.is_meta or (not cu_seqlens.is_cpu and _accepts(cu_seqlens, total)):
        return
    offsets = cu_seqlens.tolist()
    if cu_seqlens.dim() != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(
            f"cu_seqlens={offsets[:4]}..{offsets[-1:]} must be one-dimensional, start at 0 and end at B*T={total}"
        )
    if any(b <= a for a, b in zip(offsets, offsets[1:], strict=False)):
        raise ValueError("cu_seqlens must rise strictly: an empty or reversed document was given")


def _accepts(cu_seqlens: Tensor, total: int) -> bool:
    """Whether offsets on an accelerator are right, looking at one number there and only if they are new."""
    global _accepted
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        return False
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    last = _accepted
    if version is not None and last is not None and last[0]() is cu_seqlens and last[1:] == (version, total):
        return True
    ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total)
    right = bool(ends & (cu_seqlens[1:] > cu_seqlens[:-1]).all())
    if version is not None and right:
        _accepted = (weakref.ref(cu_seqlens), version, total)
    return right


def document_starts(
    cu_seqlens: Tensor | None,
    batch: int,
    tokens: int,
    *,
    position: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """First token of every token's document, as an index into its row: [B, T] int64.

    `position` [B] counts the tokens a carried cache has seen of its document; the row's first document then starts at
    `-position`. Source: docs/dla.md section 8.
    """
    index = torch.arange(tokens, device=device)
    starts = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, tokens)
        flat = torch.zeros(batch * tokens, dtype=torch.bool, device=device)
        flat.index_fill_(0, cu_seqlens[:-1].to(device=device, dtype=torch.int64), True)
        starts = torch.where(flat.view(batch, tokens), index, 0).cummax(dim=1).values
    if position is not None:
        starts = torch.where(starts == 0, -position.to(starts)[:, None], starts)
    return starts


def document_positions(
    cu_seqlens: Tensor | None,
    batch: int,
    tokens: int,
    *,
    position: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Index of every token within its document, counting what a carried cache has seen: [B, T] int64."""
    starts = document_starts(cu_seqlens, batch, tokens, position=position, device=device)
    return torch.arange(tokens, device=starts.device) - starts
