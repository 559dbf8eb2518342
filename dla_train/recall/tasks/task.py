"""What a recall task is: a maker of batches of token ids and of the answers asked for.

Targets stand at the position that asks, not one later: the answer to the token at t is `targets[:, t]`, so no trainer
shifts them. A task holds settings only; all chance comes from the generator it is handed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

IGNORED = -100
"""Target of a position that asks nothing; what cross entropy ignores by default."""


@dataclass(frozen=True)
class RecallBatch:
    """Rows of one task."""

    inputs: Tensor
    """int64 [B, T] token ids, or [B, T, 2] of (key id, value id) for paired tokens."""
    targets: Tensor
    """int64 [B, T]: the answer asked for at that position, IGNORED elsewhere."""


class RecallTask(Protocol):
    """Fulfilled by frozen dataclasses whose fields are the task's settings."""

    @property
    def tokens(self) -> int:
        """T of a batch."""
        ...

    @property
    def vocabulary(self) -> tuple[int, ...]:
        """Ids of each column of the inputs: one number for token ids, two for paired tokens."""
        ...

    @property
    def answers(self) -> int:
        """Classes of a target: targets lie in [0, answers)."""
        ...

    def batch(self, rows: int, generator: torch.Generator) -> RecallBatch:
        """`rows` new rows on the CPU; the same generator state gives the same rows."""
        ...


class AnyIdTask:
    """A task whose tokens and answers are the same ids, of its `vocab_size`."""

    vocab_size: int

    @property
    def vocabulary(self) -> tuple[int]:
        """All ids."""
        return (self.vocab_size,)

    @property
    def answers(self) -> int:
        """A target may be any id."""
        return self.vocab_size
