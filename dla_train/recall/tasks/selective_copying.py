"""Selective copying, as in MAD-lab (Poli et al., 2024), with its default settings.

Tokens to be copied stand among blanks, then comes the copy token, and at the blanks after it the tokens are asked in
their order. Every blank of the first part is put before one of the tokens, each as likely as another: none follows the
last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dla_train.recall.tasks.errors import check_fields, reject
from dla_train.recall.tasks.task import IGNORED, AnyIdTask, RecallBatch


@dataclass(frozen=True)
class SelectiveCopying(AnyIdTask):
    """The last two ids are the blank and the copy token; all others are copied."""

    name: ClassVar[str] = "selective_copying"
    copied: int = 16
    """Tokens to copy, drawn with replacement."""
    tokens: int = 256
    """T."""
    vocab_size: int = 16
    """Ids in all."""

    def __post_init__(self) -> None:
        check_fields(self, {"copied": 1, "vocab_size": 3})
        if self.tokens < 2 * self.copied + 2:
            rule = f"does not hold copied={self.copied} twice, a blank and the copy token"
            reject(self, "tokens", rule, f"give {2 * self.copied + 2} or more")

    def batch(self, rows: int, generator: torch.Generator) -> RecallBatch:
        """inputs [B, T], targets [B, T]."""
        blank, copy, context = self.vocab_size - 2, self.vocab_size - 1, self.tokens - self.copied - 1
        copied = torch.randint(blank, (rows, self.copied), generator=generator)
        before = torch.randint(self.copied, (rows, context - self.copied), generator=generator)  # whom a blank precedes
        blanks = torch.zeros_like(copied).scatter_add_(1, before, torch.ones_like(before))
        inputs = torch.full((rows, self.tokens), blank)
        inputs.scatter_(1, torch.arange(self.copied) + blanks.cumsum(dim=1), copied)
        inputs[:, context] = copy
        targets = torch.full((rows, self.tokens), IGNORED)
        targets[:, context + 1 :] = copied
        return RecallBatch(inputs, targets)
