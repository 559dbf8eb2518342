"""What every token mixer is handed and hands back: documents, plans and caches.

A mixer is a backbone times a memory policy (`recurrent.py`) or softmax attention (`attention.py`). A new backbone
is one file plus one line in `BACKBONES` there; a new policy is a name that `dla_kernels.plan_memory` knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dla_kernels import MemoryPlan, document_positions


class Cache(Protocol):
    """Decode memory of one layer: `MergeCache` of a recurrent mixer, `KeyValueCache` of attention."""

    @property
    def position(self) -> Tensor:
        """[B] int64: tokens of the current document seen so far."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def take(self, rows: Tensor) -> Cache:
        """A cache of the sequences `rows` [B'] int64, in that order."""
        ...

    @classmethod
    def join(cls, parts: Sequence[Any]) -> Cache:
        """One cache of all sequences of `parts`, which are caches of this kind and of one layer."""
        ...


@dataclass(frozen=True)
class Documents:
    """Where documents begin in a batch of packed rows: made once per forward, read by every layer."""

    positions: Tensor
    """[B, T] int64: index of each token within its document, counting tokens in a carried cache."""
    cu_seqlens: Tensor | None
    """[M+1] offsets into the flattened B*T tokens, row edges included; None is one document a row."""
    one_per_row: bool
    """No document begins inside a row."""

    @functools.cached_property
    def mask(self) -> Tensor:
        """`attention_mask` of these positions, made once for all layers."""
        return attention_mask(self.positions)

    @classmethod
    def of(
        cls,
        batch: int,
        tokens: int,
        cu_seqlens: Tensor | None,
        *,
        seen: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Documents:
        """Documents of a [batch, tokens] input; `seen` [B] counts what caches hold of each row's first document.

        Raises ValueError for offsets that do not rise strictly from 0 to B*T or leave out a row's edge.
        """
        positions = document_positions(cu_seqlens, batch, tokens, position=seen, device=device)
        if cu_seqlens is None:
            return cls(positions, None, True)
        edges = torch.arange(0, batch * tokens + 1, tokens, device=cu_seqlens.device)
        if not bool(torch.isin(edges, cu_seqlens).all()):
            raise ValueError(f"cu_seqlens must hold every row edge (multiples of T={tokens}): no document spans rows")
        return cls(positions, cu_seqlens, cu_seqlens.numel() == batch + 1)


def attention_mask(positions: Tensor, stored: int = 0) -> Tensor:
    """Which keys a query sees: bool [B, 1, T, stored + T], from positions [B, T] of queries whose keys are the last T.

    A query at position p sees exactly the p + 1 keys that end with its own.
    """
    tokens = positions.shape[1]
    own = torch.arange(tokens, device=positions.device)[:, None] + stored
    back = own - torch.arange(stored + tokens, device=positions.device)
    return ((back >= 0) & (back <= positions[..., None]))[:, None]


@dataclass(frozen=True)
class MemoryReading:
    """What one layer's memory did in one forward, for an observer: its plan and how its slots were read.

    H are the heads this rank's memory holds. Tensors of the forward itself, without gradients.
    """

    plan: MemoryPlan
    weights: Tensor
    """[B, T, H, S] read weights by recency rank (0: open), before gates."""
    gates: Tensor | None
    """[B, T, H] gates of boundaries as the read used them (1 elsewhere); None where boundaries are hard."""
    carried_gates: Tensor | None
    """[B, H, S] gates of the slots of a carried cache; None without one."""
    tau: Tensor | None
    """[H] thresholds; None for a policy that does not score."""
    gain: Tensor | None
    """[H] gains of content reading; None where slots are not read by content."""
    sharpness: Tensor | None
    """[H] its sharpness, likewise."""
    first_head: int
    """Of H among the heads of its tensor rank: not 0 under context parallelism alone."""


Observer = Callable[[int, MemoryReading], None]
"""(layer, reading) -> None: called once by every recurrent layer of a forward that is observed."""


@dataclass
class PlanRecord:
    """The memory plan of one layer in one forward: decided once, kept for recomputation; and who looks at it."""

    plan: MemoryPlan | None = None
    tau: Tensor | float | None = None
    """The thresholds it was decided with, without a gradient: kept, so that an observer need not call the module again,
    which would change the order of calls that ZeRO's stage 3 has learned."""
    observer: Callable[[MemoryReading], None] | None = None
    """Called by the mixer, which then removes it: a recomputed forward is not observed again."""


class Mixer(Protocol):
    """A token mixer: [B, T, D] -> [B, T, D], whole sequences with or without a carried cache, or one token at a time.

    Each mixer takes its own kind of cache, the one its `empty_cache` makes.
    """

    def __call__(
        self,
        hidden: Tensor,
        documents: Documents,
        record: PlanRecord,
        *,
        gate_temperature: float,
        cache: Any,
        return_cache: bool,
    ) -> tuple[Tensor, Cache | None]:
        """hidden [B, T, D] -> (output [B, T, D], the cache after the last token or None)."""
        ...

    def step(self, hidden: Tensor, cache: Any) -> Tensor:
        """One token: hidden [B, D] -> [B, D]; updates `cache` in place."""
        ...

    def empty_cache(self, batch: int, max_tokens: int, *, device: torch.device | None) -> Cache:
        """The cache before a sequence's first token."""
        ...
