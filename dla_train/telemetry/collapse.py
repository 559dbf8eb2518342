"""Warnings of memories that have collapsed: the loss does not show that a head keeps one slot, or one a token.

A head is named once, when it has been at an end for long: a head may well prefer few slots for a while, and taus that
are learned or steered come back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

RARE, CONSTANT = 0.005, 0.99
"""Boundary rates beyond which a memory is as good as one slot, or one slot a token."""
PATIENCE = 100
"""Log lines in a row outside these bounds before the warning."""
LISTED = 8
"""Layers named in one warning."""


class CollapseWatch:
    """Boundary rates of every head, line by line."""

    def __init__(self) -> None:
        self._lines: Tensor | None = None
        self._named: Tensor | None = None

    def watch(self, counts: Tensor) -> None:
        """Take [layers, H, 3] of one log line (boundaries, decisions, live slots); warn of heads that are new to it."""
        boundaries, decisions = counts[..., 0], counts[..., 1]
        rate = boundaries / decisions.clamp_min(1)
        extreme = ((rate < RARE) | (rate > CONSTANT)) & (decisions > 0)
        if self._lines is None or self._named is None:
            self._lines, self._named = torch.zeros_like(extreme, dtype=torch.int64), torch.zeros_like(extreme)
        self._lines = torch.where(extreme, self._lines + 1, 0)
        new = (self._lines >= PATIENCE) & ~self._named
        self._named |= new
        for found, what in (
            (new & (rate < RARE), "hardly any token starts a slot"),
            (new & (rate > CONSTANT), "nearly every token starts a slot"),
        ):
            if bool(found.any()):
                logger.warning(
                    "for %d log lines %s in %d of %d heads (%s): these memories are not used as meant. Move memory.tau "
                    "or use memory.tau_control=rate",
                    PATIENCE,
                    what,
                    int(found.sum()),
                    found.numel(),
                    heads_by_layer(found),
                )


def heads_by_layer(found: Tensor) -> str:
    """Words for a bool [layers, H]: `layer 0: all heads; layer 3: heads 1 and 4`."""
    layers = [layer for layer, row in enumerate(found) if bool(row.any())]
    said = [f"layer {layer}: {_heads(found[layer].nonzero().flatten().tolist(), found.shape[1])}" for layer in layers]
    more = len(said) - LISTED
    return "; ".join(said[:LISTED]) + (f"; and {more} more layers" if more > 0 else "")


def _heads(heads: Sequence[int], count: int) -> str:
    if len(heads) == count:
        return "all heads"
    listed = ", ".join(str(head) for head in heads)
    return f"head{'s' * (len(heads) > 1)} {listed}"
