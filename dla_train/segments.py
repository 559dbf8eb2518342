"""Rows through a model in segments along time, with the memory carried from one segment to the next.

The decision a reader would ask about: memory is carried inside a row and never from step to step. A step then stays a
pure function of its rows, so resuming, going back and other layouts need no stored memory; the longest document whose
memory is carried whole is a row. Forward numbers are those of whole rows. Gradients end where a segment begins
(truncated backpropagation through time), and only one segment's activations exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_kernels import MergeCache
from dla_train.data.batch import Batch


@dataclass(frozen=True)
class Segment:
    """A run of tokens of each row of a micro-batch."""

    batch: Batch
    """Its tokens and targets [b, segment]; the offsets of its documents, a part of a document counting as one."""
    goes_on: Tensor
    """[b] bool: rows that begin with the rest of a document."""
    columns: slice
    """Its place in the rows."""
    first: bool
    last: bool


def segments_of(batch: Batch, segment_tokens: int) -> Iterator[Segment]:
    """`batch` in segments of `segment_tokens`; 0, or no less than the rows' length, is one segment.

    Raises ValueError where the length is no multiple.
    """
    rows, length = batch.tokens.shape
    size = segment_tokens if 0 < segment_tokens < length else length
    if length % size:
        raise ValueError(f"rows of {length} tokens do not divide into segments of {segment_tokens}")
    if size == length:
        yield Segment(batch, torch.zeros(rows, dtype=torch.bool), slice(0, length), first=True, last=True)
        return
    starts = torch.zeros(rows * length, dtype=torch.bool)
    starts[batch.cu_seqlens[:-1].long()] = True
    for begin in range(0, length, size):
        columns = slice(begin, begin + size)
        own = starts.view(rows, length)[:, columns].clone()
        goes_on = ~own[:, 0]
        own[:, 0] = True
        offsets = torch.cat([own.flatten().nonzero().flatten(), torch.tensor([own.numel()])])
        tokens, targets = (part[:, columns].contiguous() for part in (batch.tokens, batch.targets))
        part = Batch(tokens, targets, offsets.to(batch.cu_seqlens.dtype))
        yield Segment(part, goes_on, columns, first=begin == 0, last=columns.stop == length)


class SegmentedForward:
    """Forward passes over the segments of one micro-batch, in their order.

    `model` is a LanguageModel or an engine around one. Go back through the loss of a segment before the next is asked
    for: then nothing of it is held but its memory.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._caches: list[MergeCache] = []

    def __call__(self, segment: Segment, **options: Any) -> tuple[Tensor, Tensor]:
        """(logits as the model gives them, targets [b, segment] on the device); `options` are those of `forward`."""
        batch = segment.batch
        carried: dict[str, Any] = {} if segment.last else {"return_caches": True}
        tokens, targets, offsets = (
            part.to(self._device, non_blocking=True) for part in (batch.tokens, batch.targets, batch.cu_seqlens)
        )
        if not segment.first:
            goes_on = segment.goes_on.to(self._device)
            carried["caches"] = [cache.carried(goes_on) for cache in self._caches]
        output = self._model(tokens, offsets, **carried, **options)
        self._caches = output.caches or []
        return output.logits, targets
