"""Held-out loss in nats per token and bits per byte of text.

Bits per byte compares models of different tokenizers: the summed nats over ln 2, divided by the UTF-8 bytes of the text
that the counted targets stand for. A row's text is what decoding (first input token + targets) adds over decoding that
first token, so a leading space that a tokenizer drops at the start of a string is counted where the text has it.
Special tokens (end of document) cost bits and stand for no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_train.data.loader import Batch
from dla_train.data.packing import IGNORED_TARGET
from dla_train.data.tokenizer import Tokenizer
from dla_train.models.language_model import LanguageModelOutput
from dla_train.models.loss import next_token_loss
from dla_train.segments import SegmentedForward, segments_of

Forward = Callable[[Tensor, Tensor], LanguageModelOutput]
"""(tokens [B, T], cu_seqlens [M+1]) -> output; the model, in evaluation mode, or an engine around it."""
TokenLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(logits, targets) -> (sum of nats, sum of z-loss, count)."""


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


@torch.no_grad()
def held_out_loss(
    forward: Forward,
    batches: Iterable[list[Batch]],
    tokenizer: Tokenizer,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
    *,
    loss: TokenLoss = next_token_loss,
    ranks_per_row: int = 1,
    segment_tokens: int = 0,
) -> HeldOut:
    """Loss of `forward` on this rank's micro-batches, summed over the ranks.

    Of a divided model `loss` is its token_loss and ranks_per_row the ranks among which a row's tokens lie. Rows go
    through in segments of `segment_tokens` (0: whole). The caller puts the model into evaluation mode (hard
    boundaries). Raises ValueError if there is nothing to predict.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for micro_batches in batches:
        for batch in micro_batches:
            run = SegmentedForward(forward, device)
            for segment in segments_of(batch, segment_tokens):
                nats, _, count = loss(*run(segment))
                totals[:2] += torch.stack([nats.double(), count.double()])
            totals[2] += target_bytes(batch, tokenizer) / ranks_per_row
    nats_sum, tokens, bytes_sum = sum_over_ranks(totals).tolist()
    if not tokens:
        raise ValueError("the held-out batches have no targets; use more held-out text or a shorter context")
    bits = nats_sum / math.log(2)
    return HeldOut(
        loss=nats_sum / tokens,
        bits_per_byte=bits / bytes_sum if bytes_sum else math.nan,
        tokens=int(tokens),
        text_bytes=round(bytes_sum),
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
