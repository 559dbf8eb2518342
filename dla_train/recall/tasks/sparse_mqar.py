"""MQAR hidden in filler: pairs of a key and its value lie anywhere in filler that repeats itself, the last tokens ask.

MQAR's pairs fill their part of a row, so every token begins something new; here most of a row is filler, which a memory
of several states can tell from the pairs and keep in few of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dla_train.recall.tasks.drawing import block_starts, distinct
from dla_train.recall.tasks.errors import check_fields, reject
from dla_train.recall.tasks.filler import FILLERS, filler_types
from dla_train.recall.tasks.task import IGNORED, RecallBatch


@dataclass(frozen=True)
class SparseMqar:
    """Token ids: `values`, then `keys`, then one per type of filler."""

    name: ClassVar[str] = "sparse_mqar"
    pairs: int
    """N: different keys given, each followed by its value."""
    tokens: int = 512
    """T, queries included."""
    keys: int = 64
    """Ids of keys, drawn without replacement."""
    values: int = 64
    """Ids of values, drawn with replacement."""
    queries: int = 16
    """Most keys asked, all different; the last min(pairs, queries) tokens are queries."""
    filler: str = "runs"
    """How the filler's type changes: `stable`, `random`, `drifting` or `runs` (filler.py)."""
    filler_types: int = 4
    """Types of filler, one token each."""
    run_tokens: int = 4
    """Filler tokens of one type: of `drifting` on average, of `runs` exactly."""

    def __post_init__(self) -> None:
        counts = ("pairs", "tokens", "keys", "values", "queries", "filler_types", "run_tokens")
        check_fields(self, dict.fromkeys(counts, 1), {"filler": FILLERS})
        if self.keys < self.pairs:
            reject(self, "keys", f"is less than pairs={self.pairs}", f"give keys={self.pairs} or more")
        needed = 2 * self.pairs + self.asked
        if self.tokens < needed:
            rule = f"does not hold {self.pairs} pairs and {self.asked} queries"
            reject(self, "tokens", rule, f"give {needed} or more")

    @property
    def vocabulary(self) -> tuple[int]:
        """Values, keys and filler."""
        return (self.values + self.keys + self.filler_types,)

    @property
    def answers(self) -> int:
        """A target is a value."""
        return self.values

    @property
    def asked(self) -> int:
        """Queries of a row."""
        return min(self.pairs, self.queries)

    def batch(self, rows: int, generator: torch.Generator) -> RecallBatch:
        """inputs [B, T], targets [B, T]."""
        context = self.tokens - self.asked
        keys = self.values + distinct(rows, self.pairs, self.keys, generator)
        values = torch.randint(self.values, (rows, self.pairs), generator=generator)
        starts = block_starts(rows, self.pairs, 2, context, generator)
        paired = torch.zeros(rows, context, dtype=torch.bool).scatter_(1, torch.cat([starts, starts + 1], 1), True)
        types = filler_types(self.filler, self.filler_types, self.run_tokens, paired, generator)
        asked = distinct(rows, self.asked, self.pairs, generator)

        given = (self.values + self.keys + types).scatter_(1, starts, keys).scatter_(1, starts + 1, values)
        targets = torch.full((rows, self.tokens), IGNORED)
        targets[:, context:] = values.gather(1, asked)
        return RecallBatch(torch.cat([given, keys.gather(1, asked)], 1), targets)
