"""Paired-token recall: every token carries a key and a value, so one layer suffices and only the memory is tested.

Needles hide at random in filler; the last tokens ask: they carry a needle's key and no value. There is nothing to learn
about which token belongs to which, unlike in MQAR, where a value follows its key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dla_train.recall.tasks.drawing import distinct
from dla_train.recall.tasks.errors import check_fields, reject
from dla_train.recall.tasks.filler import FILLERS, filler_types
from dla_train.recall.tasks.task import IGNORED, RecallBatch

PLACEMENTS = ("anywhere", "together")


@dataclass(frozen=True)
class PairedToken:
    """Key ids: `keys` of needles, then one per type of filler. Value ids: `values`, the filler's, then "no value"."""

    name: ClassVar[str] = "paired_token"
    needles: int
    """N: different keys given."""
    tokens: int = 128
    """T, queries included."""
    keys: int = 64
    """Ids a needle's key is drawn from, without replacement."""
    values: int = 64
    """Ids a needle's value is drawn from, with replacement."""
    queries: int = 16
    """Most keys asked, all different; the last min(needles, queries) tokens are queries."""
    filler: str = "stable"
    """How the filler's type changes: `stable`, `random`, `drifting` or `runs` (filler.py)."""
    filler_types: int = 4
    """Types of filler, each one key with one value."""
    run_tokens: int = 16
    """Filler tokens of one type: of `drifting` on average, of `runs` exactly."""
    overwritten: float = 0.0
    """Share of needles, to the nearest number, whose key is given twice: the value given last is the answer, and the
    one before is another."""
    placement: str = "anywhere"
    """Where needles lie: `anywhere`, or `together` in one stretch, itself anywhere, without filler between them."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("needles", "tokens", "keys", "queries", "filler_types", "run_tokens"), 1)
        check_fields(self, {**counts, "values": 1}, {"filler": FILLERS, "placement": PLACEMENTS})
        if self.keys < self.needles:
            reject(self, "keys", f"is less than needles={self.needles}", f"give keys={self.needles} or more")
        if not 0 <= self.overwritten <= 1:
            reject(self, "overwritten", "is not a share", "give a number from 0 to 1")
        if self.rewrites and self.values < 2:
            reject(self, "values", "leaves no other value to overwrite with", "give 2 or more, or overwritten=0")
        needed = self.needles + self.rewrites + self.asked
        if self.tokens < needed:
            what = f"{self.needles} needles, {self.rewrites} given again and {self.asked} queries"
            reject(self, "tokens", f"does not hold {what}", f"give {needed} or more")

    @property
    def vocabulary(self) -> tuple[int, int]:
        """Key ids and value ids."""
        return self.keys + self.filler_types, self.values + self.filler_types + 1

    @property
    def answers(self) -> int:
        """A target is a needle's value."""
        return self.values

    @property
    def asked(self) -> int:
        """Queries of a row."""
        return min(self.needles, self.queries)

    @property
    def rewrites(self) -> int:
        """Needles of a row whose value is given again."""
        return round(self.overwritten * self.needles)

    def _places(self, rows: int, count: int, context: int, generator: torch.Generator) -> Tensor:
        if self.placement == "anywhere":
            return distinct(rows, count, context, generator)
        first = torch.randint(context - count + 1, (rows, 1), generator=generator)
        return first + distinct(rows, count, count, generator)

    def batch(self, rows: int, generator: torch.Generator) -> RecallBatch:
        """inputs [B, T, 2], targets [B, T]."""
        context, again = self.tokens - self.asked, self.rewrites
        keys = distinct(rows, self.needles, self.keys, generator)
        values = torch.randint(self.values, (rows, self.needles), generator=generator)
        places = self._places(rows, self.needles + again, context, generator)
        # the first `again` needles have two places; they are no different from others, for keys and places are random
        one, other = places[:, :again], places[:, self.needles :]
        places = torch.cat([torch.maximum(one, other), places[:, again : self.needles], torch.minimum(one, other)], 1)
        given_keys, given_values = keys, values
        if again:
            change = torch.randint(1, self.values, (rows, again), generator=generator)
            given_keys = torch.cat([keys, keys[:, :again]], 1)
            given_values = torch.cat([values, (values[:, :again] + change) % self.values], 1)
        needle = torch.zeros(rows, context, dtype=torch.bool).scatter_(1, places, True)
        types = filler_types(self.filler, self.filler_types, self.run_tokens, needle, generator)
        asked = distinct(rows, self.asked, self.needles, generator)

        inputs = torch.empty(rows, self.tokens, 2, dtype=torch.int64)
        inputs[:, :context, 0] = (self.keys + types).scatter_(1, places, given_keys)
        inputs[:, :context, 1] = (self.values + types).scatter_(1, places, given_values)
        inputs[:, context:, 0] = keys.gather(1, asked)
        inputs[:, context:, 1] = self.values + self.filler_types
        targets = torch.full((rows, self.tokens), IGNORED)
        targets[:, context:] = values.gather(1, asked)
        return RecallBatch(inputs, targets)
