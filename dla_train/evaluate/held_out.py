"""Held-out loss in nats per token, by position in the document, and in bits per byte of text.

Bits per byte compares models of different tokenizers: the summed nats over ln 2, divided by the UTF-8 bytes of the text
that the counted targets stand for. A row's text is what decoding (first input token + targets) adds over decoding that
first token, so a leading space that a tokenizer drops at the start of a string is counted where the text has it.
Special tokens (end of document) cost bits and stand for no bytes.

The loss is that of inference: hard boundaries. A model that trains with soft ones can learn to lean on them without the
training loss showing it, so the loss with soft boundaries is taken on the same rows, and the gap is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_kernels import document_positions
from dla_train.data.loader import Batch
from dla_train.data.packing import IGNORED_TARGET
from dla_train.data.tokenizer import Tokenizer
from dla_train.evaluate.bands import Bands
from dla_train.models.context import own_time
from dla_train.models.language_model import LanguageModelOutput
from dla_train.models.loss import next_token_nats
from dla_train.parallel.axes import Axes
from dla_train.segments import SegmentedForward, segments_of

Forward = Callable[..., LanguageModelOutput]
"""(tokens [B, T], cu_seqlens [M+1]) -> output; the model, in evaluation mode, or an engine around it.

For rows in segments it takes `caches` and `return_caches` as the model does.
"""
TokenNats = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets [B, T]) -> nats of this rank's targets [B, T'], 0 where there is none."""


@dataclass(frozen=True)
class BandLoss:
    """Loss of the targets in a band of positions."""

    first: int
    """First position."""
    end: int
    """One past the last."""
    loss: float
    """Mean nats per target token."""
    tokens: int
    """Target tokens."""


@dataclass(frozen=True)
class HeldOut:
    """Result over some held-out tokens."""

    loss: float
    """Mean nats per target token."""
    bits_per_byte: float
    """Bits per UTF-8 byte of the targets' text."""
    tokens: int
    """Target tokens."""
    text_bytes: int
    """UTF-8 bytes of their text."""
    bands: tuple[BandLoss, ...] = ()
    """By position, where bands were asked for; a band without targets is left out."""
    soft_loss: float | None = None
    """`loss` with the soft boundaries of training, where a forward with them was given."""

    @property
    def gate_gap(self) -> float | None:
        """Nats per token that hard boundaries cost over soft ones."""
        return None if self.soft_loss is None else self.loss - self.soft_loss

    def numbers(self) -> dict[str, float]:
        """The result as flat numbers, as a run logs them."""
        named = {"validation_loss": self.loss, "validation_bits_per_byte": self.bits_per_byte}
        named |= {f"validation_loss_{band.first}_{band.end}": band.loss for band in self.bands}
        if self.soft_loss is not None:
            named |= {"validation_soft_loss": self.soft_loss, "validation_gate_gap": self.loss - self.soft_loss}
        return named


@torch.no_grad()
def held_out_loss(
    forward: Forward,
    batches: Iterable[list[Batch]],
    tokenizer: Tokenizer,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
    *,
    nats: TokenNats = next_token_nats,
    axes: Axes | None = None,
    bands: Bands | None = None,
    soft_forward: Forward | None = None,
    segment_tokens: int = 0,
) -> HeldOut:
    """Loss of `forward` on this rank's micro-batches, summed over the ranks in one call of `sum_over_ranks`.

    Of a divided model `nats` is its token_nats and `axes` the ranks that share it. bands: also by position.
    soft_forward: the same model with soft boundaries, for `soft_loss`. Rows go through in segments of `segment_tokens`
    (0: whole). The caller puts the model into evaluation mode (hard boundaries). Raises ValueError if there is nothing
    to predict.
    """
    axes = Axes.single() if axes is None else axes
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    by_band = torch.zeros(2, len(bands) if bands is not None else 0, dtype=torch.float64, device=device)
    for micro_batches in batches:
        for batch in micro_batches:
            run = SegmentedForward(forward, device)
            run_soft = SegmentedForward(soft_forward, device) if soft_forward is not None else None
            positions = document_positions(batch.cu_seqlens, *batch.tokens.shape)
            for segment in segments_of(batch, segment_tokens):
                logits, targets = run(segment)
                lost = nats(logits, targets)
                counted = own_time(targets, axes) != IGNORED_TARGET
                soft = lost if run_soft is None else nats(*run_soft(segment))
                totals[:3] += torch.stack([x.double().sum() for x in (lost, counted, soft)])
                if bands is not None:
                    own = own_time(positions[:, segment.columns].to(device), axes)
                    by_band += torch.stack([bands.sums(own, lost), bands.sums(own, counted)])
            totals[3] += target_bytes(batch, tokenizer) / axes.context.size
    summed = sum_over_ranks(torch.cat([totals, by_band.flatten()])).tolist()
    return _result(summed, bands, soft=soft_forward is not None)


def _result(summed: list[float], bands: Bands | None, *, soft: bool) -> HeldOut:
    """From [nats, targets, soft nats, bytes, nats of every band, targets of every band], summed over the ranks."""
    nats_sum, tokens, soft_sum, bytes_sum = summed[:4]
    if not tokens:
        raise ValueError("the held-out batches have no targets; use more held-out text or a shorter context")
    ranges = bands.ranges if bands is not None else []
    sums, counts = summed[4 : 4 + len(ranges)], summed[4 + len(ranges) :]
    bits = nats_sum / math.log(2)
    return HeldOut(
        loss=nats_sum / tokens,
        bits_per_byte=bits / bytes_sum if bytes_sum else math.nan,
        tokens=int(tokens),
        text_bytes=round(bytes_sum),
        bands=tuple(
            BandLoss(first, end, lost / count, int(count))
            for (first, end), lost, count in zip(ranges, sums, counts, strict=True)
            if count
        ),
        soft_loss=soft_sum / tokens if soft else None,
    )


def target_bytes(batch: Batch, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text of a micro-batch's counted targets."""
    total = 0
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        start = 0
        for end in range(len(targets) + 1):
            if end == len(targets) or targets[end] == IGNORED_TARGET:
                total += _added_bytes(tokens[start : start + 1], targets[start:end], tokenizer)
                start = end + 1
    return total


def _added_bytes(before: list[int], targets: list[int], tokenizer: Tokenizer) -> int:
    """Bytes that decoding `targets` after the token `before` adds."""
    if not targets:
        return 0
    return len(tokenizer.decode(before + targets).encode()) - len(tokenizer.decode(before).encode())
