"""From logits to the next token: repetition penalty, temperature, top-k, top-p, then one draw.

The filters act in this order, which is transformers'. A draw is the inverse of the distribution function at one
uniform number in [0, 1) of the prompt's own generator on the CPU, so a prompt's tokens depend neither on the device's
random numbers nor on what else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_train.generate.errors import GenerationError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Raises GenerationError for a value outside its range."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probability reaches this (Holtzman et al. 2020); 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive logits and multiplies negative ones of tokens seen so far (Keskar et al. 2019); 1 does not."""

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "at least 0 and finite"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 and finite"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise GenerationError(f"{name}={getattr(self, name)} must be {rule}")


def distribution(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Probabilities [B, vocab] float32 of the next token, from logits [B, vocab]; of temperature 0 a single 1.

    seen: bool [B, vocab], the tokens that the repetition penalty is for. Of equal logits the lower id counts as the
    more likely.
    """
    scores = logits.float()
    if sampling.repetition_penalty != 1 and seen is not None:
        penalised = torch.where(scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty)
        scores = torch.where(seen, penalised, scores)
    if sampling.temperature == 0:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
    scores = scores / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return scores.softmax(-1)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        scores[:, sampling.top_k :] = -torch.inf
    kept = scores.softmax(-1)
    if sampling.top_p < 1:
        before = kept.cumsum(-1) - kept
        kept = kept.masked_fill(before >= sampling.top_p, 0.0)
    return torch.zeros_like(kept).scatter_(-1, order, kept / kept.sum(-1, keepdim=True))


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [B] int64 of probabilities [B, vocab], at float64 numbers [B] in [0, 1); never one of probability 0."""
    reached = probabilities.double().cumsum(-1)
    wanted = uniform.to(reached)[:, None] * reached[:, -1:]  # below the last: u < 1 rounds away from it
    return torch.searchsorted(reached, wanted, right=True)[:, 0]
