"""What heads did with a text, token by token: read off one forward pass with the hard boundaries of inference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dla_kernels import boundary_gate
from dla_train.config import ConfigError
from dla_train.config_rules import longest_context
from dla_train.data.incremental_text import token_pieces
from dla_train.data.tokenizer import Tokenizer
from dla_train.models.language_model import LanguageModel
from dla_train.models.mixer import MemoryReading


@dataclass(frozen=True)
class HeadHistory:
    """One head's memory over a text of T tokens, one document."""

    layer: int
    head: int
    capacity: int
    """S: most slots alive at once."""
    score: NDArray[np.float32]
    """[T] drift of each token."""
    boundary: NDArray[np.bool_]
    """[T] whether the token opened a slot."""
    death: NDArray[np.int64]
    """[T] token at which the boundary was removed, its slot joining the older one; T where it still stands, or where
    there is none."""
    weights: NDArray[np.float32]
    """[T, S] read weight lambda of each live slot by recency rank (0: open), nan where there is no slot."""
    gate: NDArray[np.float32] | None
    """[T] gate that training gives each boundary, 1 elsewhere; None where training has hard boundaries."""
    tau: float | None
    """Threshold of the drift; None for a policy that does not score."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.score)

    @property
    def slot_starts(self) -> list[int]:
        """First token of each slot that is alive after the last token, oldest first."""
        return self.live[-1]

    @cached_property
    def live(self) -> list[list[int]]:
        """First token of each slot alive after each token, oldest first."""
        starts: list[int] = []
        found = []
        for token in range(self.tokens):
            starts = [start for start in starts if self.death[start] > token]
            starts += [token] if self.boundary[token] else []
            found.append(starts)
        return found

    @property
    def boundary_rate(self) -> float:
        """Boundaries per token, the first of which decides nothing."""
        return float(self.boundary[1:].mean()) if self.tokens > 1 else 0.0

    def slot_of_token(self, time: int) -> NDArray[np.int64]:
        """[time + 1] which of the slots alive after token `time` holds each token so far, 0 the oldest."""
        return np.searchsorted(self.live[time], np.arange(time + 1), side="right") - 1


@dataclass(frozen=True)
class Inspection:
    """A text and what the chosen heads did with it."""

    pieces: list[str]
    """[T] text of each token."""
    heads: list[HeadHistory]
    """By layer, then head."""

    def typical(self, rate: float) -> HeadHistory:
        """The head whose boundaries per token come closest to `rate`."""
        return min(self.heads, key=lambda head: abs(head.boundary_rate - rate))


@torch.no_grad()
def inspect_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    layer: int | None = None,
    head: int | None = None,
    gate_temperature: float | None = None,
    max_tokens: int | None = None,
) -> Inspection:
    """Run `text` through `model` and read off the heads of all layers, or of those chosen.

    gate_temperature: for the gates of training (default: memory.gate_temperature). Raises ConfigError for a layer or
    head the model does not have, softmax attention, and a text that is empty or too long.
    """
    _check_choice("layer", layer, model.model_config.num_layers)
    _check_choice("head", head, model.model_config.num_heads)
    if model.memory_config.policy == "none":
        raise ConfigError("the run's layers are softmax attention: they have no memory slots to show; inspect another")
    ids = tokenizer.encode(text)
    _check_length(len(ids), longest_context(model.memory_config), max_tokens)
    readings: dict[int, MemoryReading] = {}
    was_training = model.training
    model.eval()
    model(torch.tensor([ids], device=model.embedding.weight.device), observe=readings.__setitem__)
    model.reset_memory_statistics()
    model.train(was_training)
    temperature = model.memory_config.gate_temperature if gate_temperature is None else gate_temperature
    softness = temperature if model.memory_config.softly_gated else None
    heads = [number for number in range(model.model_config.num_heads) if head in (None, number)]
    layers = [number for number in readings if layer in (None, number)]
    histories = [_histories(number, readings[number], heads, softness) for number in layers]
    return Inspection(token_pieces(ids, tokenizer), list(itertools.chain.from_iterable(histories)))


def _check_choice(name: str, chosen: int | None, count: int) -> None:
    if chosen is not None and not 0 <= chosen < count:
        raise ConfigError(f"{name}={chosen} does not exist; choose 0 to {count - 1}, or all")


def _check_length(tokens: int, longest: int | None, max_tokens: int | None) -> None:
    if not tokens:
        raise ConfigError("the text is empty; give at least one token")
    if longest is not None and tokens > longest:
        raise ConfigError(f"the text has {tokens} tokens, the run's log_linear memory holds {longest}; shorten it")
    if max_tokens is not None and tokens > max_tokens:
        raise ConfigError(f"the text has {tokens} tokens, more than max_tokens={max_tokens}; shorten it, or raise that")


def _histories(layer: int, reading: MemoryReading, heads: Sequence[int], softness: float | None) -> list[HeadHistory]:
    """Of one layer's heads; `softness` is the temperature of training's gates, None where they are hard."""
    plan, tokens = reading.plan, reading.plan.boundary.shape[1]
    live = plan.slots_at(torch.arange(tokens, device=plan.boundary.device))[0] >= 0
    weights = reading.weights[0].float().masked_fill(~live, torch.nan)
    gates: Tensor | None = None
    if softness is not None and reading.tau is not None:
        gates = boundary_gate(plan.score, plan, tau=reading.tau, temperature=softness)[0].float()
    return [
        HeadHistory(
            layer=layer,
            head=head,
            capacity=plan.capacity,
            score=plan.score[0, :, head].float().cpu().numpy(),
            boundary=plan.boundary[0, :, head].cpu().numpy(),
            death=plan.death[0, :, head].clamp(max=tokens).cpu().numpy(),
            weights=weights[:, head].cpu().numpy(),
            gate=None if gates is None else gates[:, head].cpu().numpy(),
            tau=None if reading.tau is None else float(reading.tau[head]),
        )
        for head in heads
    ]
