"""Several tasks in one: a batch is wholly of one part, so its rows have one length and no row is padded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from dla_train.recall.tasks.errors import reject
from dla_train.recall.tasks.task import RecallBatch, RecallTask


@dataclass(frozen=True)
class Mixture:
    """zoology's way of training: every batch is of one segment of its data, of one length and number of pairs."""

    name: ClassVar[str] = "mixture"
    parts: tuple[RecallTask, ...]
    """Tasks with the same vocabulary and answers, so that an id means the same in all."""
    weights: tuple[float, ...]
    """Chance of each part to be the next batch, of any sum."""

    def __post_init__(self) -> None:
        if not self.parts:
            reject(self, "parts", "names no task", "give one or more")
        if len(self.weights) != len(self.parts):
            reject(self, "weights", f"are not as many as the parts, {len(self.parts)}", "give one for each part")
        if not all(type(weight) in (int, float) and 0 < weight < math.inf for weight in self.weights):
            reject(self, "weights", "are not all positive numbers", "leave out the parts that are not wanted")
        first = self.parts[0]
        for part in self.parts[1:]:
            if (part.vocabulary, part.answers) != (first.vocabulary, first.answers):
                found = (
                    f"vocabularies {first.vocabulary} and {part.vocabulary}, answers {first.answers} and {part.answers}"
                )
                reject(self, "parts", f"do not share their ids ({found})", "make them equal")

    @property
    def tokens(self) -> int:
        """T of the longest part; a batch has that of its own."""
        return max(part.tokens for part in self.parts)

    @property
    def vocabulary(self) -> tuple[int, ...]:
        """That of every part."""
        return self.parts[0].vocabulary

    @property
    def answers(self) -> int:
        """Those of every part."""
        return self.parts[0].answers

    def batch(self, rows: int, generator: torch.Generator) -> RecallBatch:
        """A batch of one part, drawn by its weight."""
        chosen = torch.multinomial(torch.tensor(self.weights, dtype=torch.float64), 1, generator=generator)
        return self.parts[int(chosen)].batch(rows, generator)
