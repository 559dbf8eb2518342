"""RULER's needle tasks (Hsieh et al., 2024) in a small closed vocabulary, for models that are trained on them.

What stands for what:

- "One of the special magic numbers for KEY is: VALUE." is MARK KEY VALUE;
- a key, in RULER an adjective and a noun, is one token, different for every key of a row;
- a number of 7 digits is 7 tokens, a uuid its 32 hexadecimal digits, a token each, all drawn alike;
- the repeated sentence about grass, sky and sun is its 19 words, a token each; an essay is words drawn alone, by Zipf's
  law;
- "What are all the special magic numbers for KEY ...?" is ASK KEY; several keys are asked and answered one by one;
- the answer is asked digit by digit while the right ones are read. Several values of a key are asked in the order they
  were given, SEP between them, where RULER takes any order.

Needles lie anywhere between two words. A score of these tasks is by digit, not by whole answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dla_train.recall.tasks.drawing import block_starts, distinct
from dla_train.recall.tasks.errors import check_fields, reject
from dla_train.recall.tasks.task import IGNORED, RecallBatch

DIGITS = 16
"""Ids of digits, the first ones."""
MARK, ASK, SEP, FIRST_KEY = range(DIGITS, DIGITS + 4)
SENTENCE = (0, 1, 2, 3, 0, 4, 2, 5, 0, 6, 2, 7, 8, 9, 10, 11, 12, 13, 14)
"""Words of "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."."""


@dataclass(frozen=True)
class Kind:
    """One of RULER's tasks."""

    essay: bool = True
    """The haystack: an essay, or the repeated sentence."""
    digits: int = 10
    """Different digits of a value."""
    length: int = 7
    """Digits of a value."""
    keys: int = 1
    """Keys given."""
    values: int = 1
    """Values given for each key."""
    queries: int = 1
    """Keys asked."""

    @property
    def needle_tokens(self) -> int:
        """MARK, the key and a value."""
        return 2 + self.length

    @property
    def answer_tokens(self) -> int:
        """ASK, the key and its values, with SEP between them, for every query."""
        return self.queries * (2 + self.values * (self.length + 1) - 1)


KINDS: dict[str, Kind] = {
    "niah_single_1": Kind(essay=False),
    "niah_single_2": Kind(),
    "niah_single_3": Kind(digits=16, length=32),
    "niah_multikey_1": Kind(keys=4),
    "niah_multiquery": Kind(keys=4, queries=4),
    "niah_multivalue": Kind(values=4),
}
"""By RULER's names."""


@dataclass(frozen=True)
class Needle:
    """Token ids: 16 digits, MARK, ASK, SEP, then keys, then words. All kinds share them, so they can be mixed."""

    name: ClassVar[str] = "needle"
    kind: str
    """`niah_single_1`, `_2` or `_3`, `niah_multikey_1`, `niah_multiquery` or `niah_multivalue`."""
    tokens: int = 512
    """T, question and answer included."""
    keys: int = 64
    """Ids of keys."""
    words: int = 256
    """Ids of the haystack's words; the sentence uses the first 15."""

    def __post_init__(self) -> None:
        check_fields(self, {"keys": 1, "words": max(SENTENCE) + 1}, {"kind": tuple(KINDS)})
        kind = KINDS[self.kind]
        if self.keys < kind.keys:
            reject(self, "keys", f"is less than the {kind.keys} of {self.kind}", f"give {kind.keys} or more")
        needed = kind.keys * kind.values * kind.needle_tokens + kind.answer_tokens
        if self.tokens < needed:
            reject(self, "tokens", f"does not hold {self.kind} and a word", f"give {needed} or more")

    @property
    def vocabulary(self) -> tuple[int]:
        """Digits, signs, keys and words."""
        return (FIRST_KEY + self.keys + self.words,)

    @property
    def answers(self) -> int:
        """A target is a digit."""
        return DIGITS

    def batch(self, rows: int, generator: torch.Generator) -> RecallBatch:
        """inputs [B, T], targets [B, T]."""
        kind = KINDS[self.kind]
        keys = FIRST_KEY + distinct(rows, kind.keys, self.keys, generator)
        values = torch.randint(kind.digits, (rows, kind.keys, kind.values, kind.length), generator=generator)
        context = self._context(kind, keys, values, generator)
        question = _question(kind, keys[:, : kind.queries], values[:, : kind.queries])
        tokens = torch.cat([context, question], 1)  # [B, T + 1]: the last digit is only asked
        answers = tokens.masked_fill(tokens >= DIGITS, IGNORED)
        answers[:, : context.shape[1]] = IGNORED
        return RecallBatch(tokens[:, :-1], answers[:, 1:])

    def _context(self, kind: Kind, keys: Tensor, values: Tensor, generator: torch.Generator) -> Tensor:
        """The haystack with all needles in it, [B, C]; keys [B, K], values [B, K, V, length]."""
        rows, needles, width = keys.shape[0], kind.keys * kind.values, kind.needle_tokens
        length = self.tokens + 1 - kind.answer_tokens
        starts = block_starts(rows, needles, width, length, generator)
        starts = starts.gather(1, distinct(rows, needles, needles, generator))
        starts = starts.view(rows, kind.keys, kind.values).sort(dim=2).values  # values of a key are given in order
        mark = torch.full((rows, kind.keys, kind.values, 1), MARK)
        blocks = torch.cat([mark, keys[:, :, None, None].expand_as(mark), values], 3)  # [B, K, V, width]
        places = (starts[..., None] + torch.arange(width)).flatten(1)
        hidden = torch.zeros(rows, length, dtype=torch.bool).scatter_(1, places, True)
        word = ((~hidden).cumsum(dim=1) - 1).clamp(min=0)  # how many words came before
        return self._haystack(kind, rows, length, generator).gather(1, word).scatter_(1, places, blocks.flatten(1))

    def _haystack(self, kind: Kind, rows: int, length: int, generator: torch.Generator) -> Tensor:
        first_word = FIRST_KEY + self.keys
        if not kind.essay:
            word = torch.tensor(SENTENCE)[torch.arange(length) % len(SENTENCE)]
            return (first_word + word).expand(rows, -1)
        chances = 1 / torch.arange(1, self.words + 1, dtype=torch.float64)
        words = torch.multinomial(chances, rows * length, replacement=True, generator=generator)
        return first_word + words.view(rows, length)


def _question(kind: Kind, keys: Tensor, values: Tensor) -> Tensor:
    """ASK KEY VALUE SEP VALUE ... for every key of keys [B, Q], values [B, Q, V, length]."""
    separated = torch.cat([values, torch.full_like(values[..., :1], SEP)], 3).flatten(2)[:, :, :-1]
    return torch.cat([torch.full_like(keys, ASK)[:, :, None], keys[:, :, None], separated], 2).flatten(1)
