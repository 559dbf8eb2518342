"""Nats of every token of some documents under one model: each document from its beginning, alone, in chunks.

Documents of a batch are filled up on the right, where nothing that counts can see it. Chunks are continued on the
caches, so the memory that a document needs does not grow with it (softmax attention's keys aside).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dla_train.config import ConfigError
from dla_train.data.indexed import TokenFiles
from dla_train.models.language_model import LanguageModel
from dla_train.parallel.vocab import IGNORED


@dataclass(frozen=True)
class Documents:
    """The text that all arms read."""

    numbers: NDArray[np.int64]
    """[N] places in the token files."""
    tokens: NDArray[np.int64]
    """[N, T + 1], 0 beyond a document's end."""
    lengths: NDArray[np.int64]
    """[N] tokens of each, at most T + 1."""

    @property
    def positions(self) -> int:
        """T."""
        return self.tokens.shape[1] - 1


def choose_documents(files: TokenFiles, count: int, context_tokens: int, minimum_tokens: int) -> Documents:
    """Up to `count` documents of at least `minimum_tokens` (0: context_tokens + 1), spread evenly over the files.

    Raises ConfigError where there are not two.
    """
    least = minimum_tokens or context_tokens + 1
    lengths = files.document_lengths.astype(np.int64)
    eligible = np.flatnonzero(lengths >= max(least, 2))
    if len(eligible) < 2:
        raise ConfigError(
            f"{', '.join(files.prefixes)} has {len(eligible)} documents of {max(least, 2)} tokens or more (the longest "
            f"has {lengths.max()}), a comparison needs two; lower context_tokens={context_tokens}, set minimum_tokens, "
            "or name longer texts with data=[PREFIX]"
        )
    numbers = eligible[np.linspace(0, len(eligible) - 1, min(count, len(eligible))).round().astype(np.int64)]
    taken = np.minimum(lengths[numbers], context_tokens + 1)
    tokens = np.zeros((len(numbers), context_tokens + 1), dtype=np.int64)
    for row, (number, length) in enumerate(zip(numbers, taken, strict=True)):
        tokens[row, :length] = files.read(int(number), 0, int(length))
    return Documents(numbers, tokens, taken)


@torch.no_grad()
def document_losses(
    model: LanguageModel, documents: Documents, *, batch_rows: int, chunk_tokens: int
) -> Iterator[NDArray[np.float32]]:
    """Nats [rows, T] of one batch of documents after the other, nan where there is no target.

    Position p is the loss of token p + 1 given tokens 0 to p. The model is in evaluation mode.
    """
    device = model.embedding.weight.device
    for first in range(0, len(documents.tokens), batch_rows):
        tokens = torch.from_numpy(documents.tokens[first : first + batch_rows]).to(device)
        lengths = torch.from_numpy(documents.lengths[first : first + batch_rows]).to(device)
        there = torch.arange(documents.positions, device=device) < lengths[:, None] - 1
        targets = tokens[:, 1:].masked_fill(~there, IGNORED)
        caches, parts = model.empty_caches(len(tokens), documents.positions), list[Tensor]()
        pieces = (part.split(chunk_tokens, dim=1) for part in (tokens[:, :-1], targets))
        for piece, wanted in zip(*pieces, strict=True):
            out = model(piece, caches=caches, return_caches=True)
            assert out.caches is not None
            caches = out.caches
            parts.append(model.token_nats(out.logits, wanted))
        yield torch.cat(parts, dim=1).masked_fill(~there, torch.nan).float().cpu().numpy()
