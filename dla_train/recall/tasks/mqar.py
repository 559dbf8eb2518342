"""Multi-query associative recall, generated as in zoology (Arora, Eyuboglu et al., 2024), and its variant that forgets.

A row is K1 V1 ... KN VN and then queries: key i is asked once, 2 * g_i tokens after the pairs. The gaps g are drawn
without replacement, with probability proportional to (g + 1) ** (power_a - 1) and in the order of the keys: the first
tend to be asked first. Key ids are 1 ... vocab_size // 2 - 1, value ids the upper half; both are drawn without
replacement in a row. The answer stands at the query. Everything after the pairs that is no query is a random id, be it
a key's or a value's, or 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dla_train.recall.tasks.drawing import distinct
from dla_train.recall.tasks.errors import check_fields, reject
from dla_train.recall.tasks.task import IGNORED, AnyIdTask, RecallBatch


@dataclass(frozen=True, kw_only=True)
class Mqar(AnyIdTask):
    """zoology's `multiquery_ar`, with one pass over the pairs."""

    name: ClassVar[str] = "mqar"
    pairs: int
    """N: pairs given, and asked."""
    tokens: int = 64
    """T."""
    vocab_size: int = 8192
    """Ids in all: the lower half but 0 are keys, the upper half values."""
    power_a: float = 0.01
    """Exponent of the gaps: 1 is uniform, near 0 most keys are asked early."""
    random_non_queries: bool = True
    """Random ids between queries; otherwise 0, which is easier."""

    def __post_init__(self) -> None:
        check_fields(self, {"pairs": 1, "tokens": 1, "vocab_size": 2})
        _check_room(self, self.pairs, 4 * self.pairs)

    def batch(self, rows: int, generator: torch.Generator) -> RecallBatch:
        """inputs [B, T], targets [B, T]."""
        keys, values = _pairs(rows, self.pairs, self.vocab_size, generator)
        return _with_queries(self, keys, values, torch.stack([keys, values], 2).flatten(1), generator)


@dataclass(frozen=True, kw_only=True)
class ForgettingMqar(Mqar):
    """zoology's `forgetting_mqar`: after the pairs some keys are given again, with another value, which is the answer.

    Two things differ. Here the new value is never the key's first one; there it differs from the first value of some
    other key, and so equals the key's own once in thousands.
    """

    name: ClassVar[str] = "forgetting_mqar"
    updates: int
    """Keys given again, each once, in random order; the other pairs - updates keep their first value."""

    def __post_init__(self) -> None:
        check_fields(self, {"pairs": 1, "updates": 0, "tokens": 1, "vocab_size": 2})
        if self.updates > self.pairs:
            reject(self, "updates", f"is more than pairs={self.pairs}", f"give {self.pairs} or less")
        _check_room(self, self.pairs, 4 * self.pairs + 2 * self.updates)

    def batch(self, rows: int, generator: torch.Generator) -> RecallBatch:
        """inputs [B, T], targets [B, T]."""
        keys, first = _pairs(rows, self.pairs, self.vocab_size, generator)
        lowest, kinds = self.vocab_size // 2, self.vocab_size - self.vocab_size // 2
        updated = distinct(rows, self.updates, self.pairs, generator)
        change = torch.randint(1, kinds, (rows, self.updates), generator=generator)
        renewed = lowest + (first.gather(1, updated) - lowest + change) % kinds
        given_keys = torch.cat([keys, keys.gather(1, updated)], 1)
        given_values = torch.cat([first, renewed], 1)
        given = torch.stack([given_keys, given_values], 2).flatten(1)
        return _with_queries(self, keys, first.scatter(1, updated, renewed), given, generator)


def _check_room(task: Mqar, pairs: int, needed: int) -> None:
    if not 0 <= task.power_a <= 1:
        reject(task, "power_a", "is out of range", "give a number from 0 to 1")
    if task.tokens % 2:
        reject(task, "tokens", "is odd, and pairs are two tokens", f"give {task.tokens + 1}")
    if task.tokens < needed:
        what = f"what is given and pairs={pairs} queries, two tokens each"
        reject(task, "tokens", f"does not hold {what}", f"give {needed} or more")
    if task.vocab_size // 2 - 1 < pairs:
        reject(task, "vocab_size", f"has fewer than pairs={pairs} key ids", f"give {2 * pairs + 2} or more")
    if task.vocab_size <= task.tokens:
        reject(task, "vocab_size", f"is not more than tokens={task.tokens}", f"give {task.tokens + 1} or more")


def _pairs(rows: int, pairs: int, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    lowest = vocab_size // 2
    keys = 1 + distinct(rows, pairs, lowest - 1, generator)
    return keys, lowest + distinct(rows, pairs, vocab_size - lowest, generator)


def _with_queries(task: Mqar, keys: Tensor, answers: Tensor, given: Tensor, generator: torch.Generator) -> RecallBatch:
    """Rows of `given` [B, G] and then queries for `keys` [B, N], whose answers are `answers` [B, N]."""
    rows, start = given.shape
    space = (task.tokens - start) // 2
    # a race: times exponential with rate p, the first N to arrive, are a draw without replacement, in its order
    chance = torch.arange(1, space + 1, dtype=torch.float64) ** (task.power_a - 1)
    arrival = torch.empty(rows, space, dtype=torch.float64).exponential_(generator=generator) / chance
    queries = start + 2 * arrival.argsort(dim=1)[:, : keys.shape[1]]
    if task.random_non_queries:
        inputs = torch.randint(task.vocab_size, (rows, task.tokens), generator=generator)
    else:
        inputs = torch.zeros(rows, task.tokens, dtype=torch.int64)
    inputs[:, :start] = given
    targets = torch.full((rows, task.tokens), IGNORED).scatter_(1, queries, answers)
    return RecallBatch(inputs.scatter_(1, queries, keys), targets)
