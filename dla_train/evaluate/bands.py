"""Bands of positions in a document: the few ranges over which a loss by position is summed up.

A position is the number of tokens of its document that the model has read before the token that is fed in, as the
memory counts them: in packed rows it begins anew with every document. Without edges of its own a run has four bands
that end at 1/16, 1/4, 1/2 and all of the context: [0, 1K), [1K, 4K), [4K, 8K) and [8K, 16K) at 16K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DEFAULT_DIVISORS = (16, 4, 2)


@dataclass(frozen=True)
class Bands:
    """Ranges of positions that follow one another from 0 to `end`."""

    edges: tuple[int, ...]
    """Where bands meet, rising, above 0 and below `end`."""
    end: int
    """Positions in all."""

    @classmethod
    def of(cls, context_tokens: int, edges: Sequence[int] = ()) -> Bands:
        """Bands of rows of `context_tokens`; without edges those of the module's docstring.

        Raises ValueError for edges that do not rise inside the context.
        """
        chosen = tuple(edges) or tuple(sorted({context_tokens // divisor for divisor in _DEFAULT_DIVISORS} - {0}))
        ends = (0, *chosen, context_tokens)
        if any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"band edges {list(chosen)} do not rise strictly between 0 and {context_tokens} tokens")
        return cls(chosen, context_tokens)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(first position, one past the last) of every band."""
        ends = (0, *self.edges, self.end)
        return list(zip(ends, ends[1:], strict=False))

    def __len__(self) -> int:
        return len(self.edges) + 1

    def index(self, positions: Tensor) -> Tensor:
        """The band of each position: int64, like `positions` (any shape)."""
        edges = torch.tensor(self.edges, dtype=positions.dtype, device=positions.device)
        return torch.bucketize(positions.contiguous(), edges, right=True)

    def sums(self, positions: Tensor, values: Tensor) -> Tensor:
        """[bands] float64: `values` (shaped like `positions`) summed in each band."""
        totals = torch.zeros(len(self), dtype=torch.float64, device=values.device)
        return totals.index_add_(0, self.index(positions).flatten(), values.flatten().double())
