"""Log-likelihoods of tokens after a context, in batches of unequal rows padded on the right.

Right padding is exact: everything in the model is causal, so what stands behind a row's last token changes nothing
before it. Rows are sorted by length, so little is padding, and equal inputs are computed once: the choices of a
question whose answers are single tokens share theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dla_train.models.language_model import LanguageModel

VOCABULARY_ROWS = 2048
"""Positions whose scores are made float32 at once; bounds the memory beside the model's own output."""

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Score:
    """Of one request."""

    log_likelihood: float
    """Sum over the targets, in nats."""
    greedy: bool
    """Every target is the likeliest token."""


@dataclass(frozen=True)
class Request:
    """Tokens to be given to the model, and what follows them: `targets` belong to the last positions of `inputs`."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


@torch.no_grad()
def score(
    model: LanguageModel, requests: Sequence[Request], *, batch_tokens: int, rank: int = 0, ranks: int = 1
) -> Iterator[list[tuple[int, Score]]]:
    """The scores of each batch with the indices of their requests, longest first; the model is in evaluation mode.

    batch_tokens: most tokens of a batch, padding included; a longer row is a batch of its own. Of several ranks each
    scores every so-manieth batch, the same batches as one rank alone; all make as many rounds, the last perhaps empty.
    """
    users: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        users.setdefault(request.inputs, []).append(index)
    device = model.embedding.weight.device
    for rows in dealt(list(batches(sorted(users, key=len, reverse=True), batch_tokens)), rank, ranks):
        if rows is None:
            yield []
            continue
        indices = [(row, index) for row, inputs in enumerate(rows) for index in users[inputs]]
        places = [
            (row * len(rows[0]) + len(rows[row]) - len(requests[index].targets) + offset, target, number)
            for number, (row, index) in enumerate(indices)
            for offset, target in enumerate(requests[index].targets)
        ]
        positions, targets, owners = torch.tensor(places, device=device).unbind(-1)
        asked, place = positions.unique(return_inverse=True)
        logits = model(padded(rows, device), positions=asked).logits
        scores = _scores(logits, place, targets, owners, len(indices))
        yield list(zip([index for _, index in indices], scores, strict=True))


def batches(rows: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Rows sorted by falling length, cut into batches of at most `batch_tokens` with their padding."""
    begin = 0
    while begin < len(rows):
        count = max(1, batch_tokens // len(rows[begin]))
        yield list(rows[begin : begin + count])
        begin += count


def dealt(every: Sequence[Batch], rank: int, ranks: int) -> Iterator[Batch | None]:
    """This rank's batch of each round, None where the last round has fewer batches than ranks."""
    for begin in range(0, len(every), ranks):
        yield every[begin + rank] if begin + rank < len(every) else None


def padded(rows: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """[B, T] int64, zeros behind each row."""
    longest = len(rows[0])
    return torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows], device=device)


def _scores(logits: Tensor, place: Tensor, targets: Tensor, owners: Tensor, count: int) -> list[Score]:
    """Sums by request over places, each [N]: a row of `logits`, its target, and whose it is of `count` requests."""
    sums = torch.zeros(count, dtype=torch.float64, device=logits.device)
    missed = torch.zeros(count, dtype=torch.int64, device=logits.device)
    for part in torch.arange(len(place), device=logits.device).split(VOCABULARY_ROWS):
        wide = logits[place[part]].float()
        chosen = wide.gather(-1, targets[part, None])[:, 0]
        sums.index_add_(0, owners[part], (chosen - wide.logsumexp(-1)).double())
        missed.index_add_(0, owners[part], (wide.argmax(-1) != targets[part]).long())
    return [Score(total, not wrong) for total, wrong in zip(sums.tolist(), missed.tolist(), strict=True)]
