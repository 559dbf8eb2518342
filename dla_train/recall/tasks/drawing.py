"""Draws that every task makes, vectorised over rows: distinct ids, and places of blocks that do not overlap."""

from __future__ import annotations

import torch
from torch import Tensor

SPARSE = 8
"""Ids per draw from which repeated ones are drawn again; below, ids are shuffled, for repeats would be many."""


def distinct(rows: int, count: int, population: int, generator: torch.Generator) -> Tensor:
    """int64 [rows, count]: ordered draws from range(population) without replacement, each order as likely as another.

    Drawing repeated ids again treats all ids alike, so no sequence of distinct ids is preferred; it costs nothing that
    grows with the population.
    """
    if population < SPARSE * count:
        return torch.rand(rows, population, generator=generator).argsort(dim=1)[:, :count]
    drawn = torch.randint(population, (rows, count), generator=generator)
    while True:
        ordered, column = drawn.sort(dim=1, stable=True)
        equal = ordered[:, 1:] == ordered[:, :-1]
        if not equal.any():
            return drawn
        repeated = torch.zeros_like(drawn, dtype=torch.bool).scatter_(1, column[:, 1:], equal)
        drawn[repeated] = torch.randint(population, (int(repeated.sum()),), generator=generator)


def block_starts(rows: int, count: int, width: int, tokens: int, generator: torch.Generator) -> Tensor:
    """int64 [rows, count], ascending: where `count` blocks of `width` tokens begin among `tokens`, none overlapping.

    All placements are equally likely: each is a choice of cells once every block is shrunk to one cell.
    """
    cells = distinct(rows, count, tokens - count * (width - 1), generator).sort(dim=1).values
    return cells + torch.arange(count) * (width - 1)
