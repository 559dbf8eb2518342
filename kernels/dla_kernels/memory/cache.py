"""MergeCache: the fixed-size memory of one layer between calls (docs/dla.md, section 7).

Preallocated; its bytes are a formula of the configuration and never of the context. Slots lie oldest first; slots at
or beyond `fill` are unused and zero. Slot scores are float64: sums of equal float32 scores are then exact, so that
ties between merge candidates resolve alike in every implementation and order of summation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class MergeCache:
    """States and bookkeeping of S slots for B sequences and H heads, plus the short convolution's window."""

    states: Tensor
    """[B, H, S, K, V] float32: slot states, oldest first."""
    counts: Tensor
    """[B, H, S] int64: tokens in each slot."""
    scores: Tensor
    """[B, H, S] float64: sum of the slot's drift scores."""
    gates: Tensor
    """[B, H, S] float32: gate p of the boundary that opened each slot (1 where hard)."""
    fill: Tensor
    """[B, H] int64: live slots m."""
    position: Tensor
    """[B] int64: tokens of the current document seen so far."""
    key_sums: Tensor | None = None
    """[B, H, S, R] float32: sums of routing keys, for content reading."""
    conv: Tensor | None = None
    """[B, channels, W-1]: last inputs of the short convolution, oldest first."""

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        slots: int,
        key_dim: int,
        value_dim: int,
        *,
        routing_dim: int = 0,
        conv_channels: int = 0,
        conv_width: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> MergeCache:
        """An empty cache. `dtype` is that of states, gates and sums (float64 for reference checks)."""

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            states=zeros(batch, heads, slots, key_dim, value_dim),
            counts=zeros(batch, heads, slots, dtype=torch.int64),
            scores=zeros(batch, heads, slots, dtype=torch.float64),
            gates=torch.ones(batch, heads, slots, dtype=dtype, device=device),
            fill=zeros(batch, heads, dtype=torch.int64),
            position=zeros(batch, dtype=torch.int64),
            key_sums=zeros(batch, heads, slots, routing_dim) if routing_dim else None,
            conv=zeros(batch, conv_channels, conv_width - 1) if conv_channels and conv_width > 1 else None,
        )

    @staticmethod
    def nbytes_of(
        batch: int,
        heads: int,
        slots: int,
        key_dim: int,
        value_dim: int,
        routing_dim: int = 0,
        conv_channels: int = 0,
        conv_width: int = 0,
    ) -> int:
        """Bytes of a float32 cache of this shape: B*(H*S*(4*(K*V + R + 1) + 16) + 8*H + 8 + 4*channels*(W-1))."""
        per_slot = 4 * (key_dim * value_dim + routing_dim + 1) + 16
        window = 4 * conv_channels * max(conv_width - 1, 0)
        return batch * (heads * slots * per_slot + 8 * heads + 8 + window)

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the cache."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    @property
    def slots(self) -> int:
        """S: most slots a head can hold."""
        return self.states.shape[2]

    def clone(self) -> MergeCache:
        """A detached copy that shares nothing with this cache."""
        return dataclasses.replace(self, **{name: t.detach().clone() for name, t in self._tensors().items()})

    def carried(self, rows: Tensor) -> MergeCache:
        """A detached cache for what follows: `rows` [B] (bool) go on with their document, the others are empty."""
        kept = {}
        for name, tensor in self._tensors().items():
            mask = rows.view(-1, *[1] * (tensor.dim() - 1))
            kept[name] = torch.where(mask, tensor.detach(), torch.full_like(tensor, 1 if name == "gates" else 0))
        return dataclasses.replace(self, **kept)

    def take(self, rows: Tensor) -> MergeCache:
        """A cache of the sequences `rows` [B'] int64, in that order; shares nothing with this one."""
        return dataclasses.replace(self, **{name: t.index_select(0, rows) for name, t in self._tensors().items()})

    @classmethod
    def join(cls, parts: Sequence[MergeCache]) -> MergeCache:
        """One cache of all sequences of `parts`, which are of one shape but for the number of sequences."""
        tensors = [part._tensors() for part in parts]
        return dataclasses.replace(parts[0], **{name: torch.cat([t[name] for t in tensors]) for name in tensors[0]})

    def reset(self) -> None:
        """Empty every sequence in place: a new document starts."""
        for name, tensor in self._tensors().items():
            tensor.fill_(1 if name == "gates" else 0)

    def slot_starts(self) -> Tensor:
        """[B, H, S] int64: first token of each live slot, counted from the next token (newest: -n); 0 unused."""
        return -self.counts.flip(-1).cumsum(-1).flip(-1)

    def _tensors(self) -> dict[str, Tensor]:
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in fields if value is not None}
