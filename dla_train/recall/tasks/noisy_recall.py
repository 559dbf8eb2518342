"""In-context recall among noise, as in MAD-lab (Poli et al., 2024), with its default settings.

A row is slots of two tokens: a key and its value, or two tokens of noise; keys return, always with their value. A key
given before asks, and so does that of the last slot, which is one of the keys given, each as likely as another. Key ids
come first, then values, then noise. One of the other slots, drawn at random, is never noise. MAD-lab draws it from all
slots; a row there has no pair at all with a chance of noise ** (slots - 1) / slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dla_train.recall.tasks.errors import check_fields, reject
from dla_train.recall.tasks.task import IGNORED, AnyIdTask, RecallBatch


@dataclass(frozen=True)
class NoisyRecall(AnyIdTask):
    """MAD-lab's `noisy-in-context-recall`, which asks many times in a row; without noise its `in-context-recall`."""

    name: ClassVar[str] = "noisy_recall"
    slots: int = 64
    """Slots of a row: half of MAD-lab's seq_len. The last value is only asked, so T = 2 * slots - 1."""
    vocab_size: int = 32
    """Ids in all; what noise leaves is halved into keys and values."""
    noise_vocab_size: int = 16
    """Ids of noise."""
    noise: float = 0.2
    """Chance that a slot is noise."""
    next_token: bool = False
    """Ask for the next token everywhere, what MAD-lab trains on; it tests on recalled values only."""

    def __post_init__(self) -> None:
        check_fields(self, {"slots": 2, "noise_vocab_size": 0})
        if self.vocab_size < self.noise_vocab_size + 2:
            rule = f"leaves no keys and values besides noise_vocab_size={self.noise_vocab_size}"
            reject(self, "vocab_size", rule, f"give {self.noise_vocab_size + 2} or more")
        if not 0 <= self.noise < 1:
            reject(self, "noise", "is not a chance below 1", "give 0 or more, less than 1")
        if self.noise and not self.noise_vocab_size:
            reject(self, "noise_vocab_size", f"has no ids for noise={self.noise}", "give 1 or more, or noise=0")

    @property
    def tokens(self) -> int:
        """T."""
        return 2 * self.slots - 1

    def batch(self, rows: int, generator: torch.Generator) -> RecallBatch:
        """inputs [B, T], targets [B, T]."""
        free, given_slots = self.vocab_size - self.noise_vocab_size, self.slots - 1
        key_ids = free // 2
        value_of = torch.randint(key_ids, free, (rows, key_ids), generator=generator)
        keys = torch.randint(key_ids, (rows, given_slots), generator=generator)
        noisy = torch.rand(rows, given_slots, generator=generator) < self.noise
        noisy.scatter_(1, torch.randint(given_slots, (rows, 1), generator=generator), False)
        # where each key is given first; `given_slots` if never
        slot = torch.arange(given_slots).expand(rows, -1)
        first = torch.full((rows, key_ids), given_slots).scatter_reduce(
            1, keys, slot.masked_fill(noisy, given_slots), "amin"
        )
        chance = torch.rand(rows, key_ids, generator=generator)
        probe = chance.masked_fill(first == given_slots, -1).argmax(dim=1, keepdim=True)

        keys = torch.cat([keys, probe], 1)
        row = torch.stack([keys, value_of.gather(1, keys)], 2)  # [B, slots, 2]
        if self.noise:
            noise = torch.randint(free, self.vocab_size, (rows, given_slots, 2), generator=generator)
            row[:, :-1] = torch.where(noisy[:, :, None], noise, row[:, :-1])
        asks = torch.ones(rows, self.slots, dtype=torch.bool)
        asks[:, :-1] = ~noisy & (slot > first.gather(1, keys[:, :-1]))
        tokens = row.flatten(1)
        if self.next_token:
            return RecallBatch(tokens[:, :-1], tokens[:, 1:])
        targets = torch.full((rows, self.tokens), IGNORED)
        targets[:, ::2] = row[:, :, 1].masked_fill(~asks, IGNORED)
        return RecallBatch(tokens[:, :-1], targets)
