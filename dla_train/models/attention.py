"""Softmax attention, the full-memory baseline: grouped queries (GQA), rotary positions, PyTorch's fused kernel.

Positions are counted within a document, and no query sees another document's keys. With one document per row the
fused causal path runs; packed rows and carried caches take an explicit mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_train.config import ModelConfig
from dla_train.models.backbone import split_heads
from dla_train.models.context import to_heads, to_time
from dla_train.models.linear import Linear
from dla_train.models.mixer import Documents, PlanRecord, attention_mask
from dla_train.parallel.axes import Axes
from dla_train.parallel.sections import local_model


@dataclass
class KeyValueCache:
    """Keys and values of a sequence so far, preallocated to the longest sequence it will hold."""

    keys: Tensor
    """[B, max_tokens, Hk, K] in the compute dtype, rotated."""
    values: Tensor
    """[B, max_tokens, Hk, K]."""
    position: Tensor
    """[B] int64: tokens of the current document seen so far; they are the last ones stored."""
    length: int = 0
    """Tokens stored."""

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the cache."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.position))

    def clone(self) -> KeyValueCache:
        """A detached copy that shares nothing with this cache."""
        return KeyValueCache(self.keys.clone(), self.values.clone(), self.position.clone(), self.length)

    def take(self, rows: Tensor) -> KeyValueCache:
        """A cache of the sequences `rows` [B'] int64, in that order; shares nothing with this one."""
        keys, values, position = (t.index_select(0, rows) for t in (self.keys, self.values, self.position))
        return KeyValueCache(keys, values, position, self.length)

    @classmethod
    def join(cls, parts: Sequence[KeyValueCache]) -> KeyValueCache:
        """One cache of all sequences of `parts`, with as much room as the part that has most left.

        Keys end together, whatever their number: those of a shorter sequence stand behind zeros that no query of it
        sees, since a query at position p sees the p + 1 keys that end with its own.
        """
        length = max(part.length for part in parts)
        room = max(part.keys.shape[1] - part.length for part in parts)
        sequences = sum(len(part.keys) for part in parts)
        keys = parts[0].keys.new_zeros(sequences, length + room, *parts[0].keys.shape[2:])
        joined = cls(keys, torch.zeros_like(keys), torch.cat([part.position for part in parts]), length)
        first = 0
        for part in parts:
            place = (slice(first, first + len(part.keys)), slice(length - part.length, length))
            joined.keys[place], joined.values[place] = part.keys[:, : part.length], part.values[:, : part.length]
            first += len(part.keys)
        return joined

    def append(self, keys: Tensor, values: Tensor, documents: Documents) -> None:
        """Store keys and values [B, T, Hk, K]. Raises ValueError when they do not fit."""
        end = self.length + keys.shape[1]
        if end > self.keys.shape[1]:
            raise ValueError(
                f"key-value cache holds max_tokens={self.keys.shape[1]}, {end} are needed; allocate a longer one"
            )
        self.keys[:, self.length : end] = keys.detach()
        self.values[:, self.length : end] = values.detach()
        self.length = end
        self.position.copy_(documents.positions[:, -1] + 1)


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary embedding (Su et al. 2021), halves convention: x [B, T, H, K], positions [B, T] -> like x.

    Angles are float32 whatever x is: bfloat16 cannot tell position 257 from 256.
    """
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = positions[..., None].to(torch.float32) * base**-exponent
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    first, second = x.unflatten(-1, (2, half)).unbind(-2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal softmax attention within documents."""

    def __init__(self, model: ModelConfig, axes: Axes, *, compute_dtype: torch.dtype) -> None:
        """Sizes are this rank's part of the whole `model`."""
        super().__init__()
        model = local_model(model, axes.tensor.size)
        self.model, self.context = model, axes.context
        self.dtype = compute_dtype
        self.q = Linear(model.width, model.num_heads * model.key_dim)
        self.k = Linear(model.width, model.num_key_heads * model.key_dim)
        self.v = Linear(model.width, model.num_key_heads * model.key_dim)
        self.out = Linear(model.num_heads * model.key_dim, model.width)

    def forward(
        self,
        hidden: Tensor,
        documents: Documents,
        record: PlanRecord,
        *,
        gate_temperature: float,
        cache: KeyValueCache | None = None,
        return_cache: bool = False,
    ) -> tuple[Tensor, KeyValueCache | None]:
        """hidden [B, T, D] -> (output [B, T, D], the cache or None). A given cache is extended in place.

        Under context parallelism `hidden` holds this rank's run of the tokens, `documents` all of them.

        `record` and `gate_temperature` belong to bounded memories; attention keeps everything and decides nothing.
        """
        q, k, v = self._project(hidden, documents.positions)
        if cache is None and return_cache:
            cache = self.empty_cache(hidden.shape[0], hidden.shape[1], device=hidden.device)
        stored = cache.length if cache is not None else 0
        if cache is not None:
            cache.append(k, v, documents)
        if stored and cache is not None:
            k, v = cache.keys[:, : cache.length], cache.values[:, : cache.length]
        mask: Tensor | None = None
        if stored:
            mask = attention_mask(documents.positions, stored)
        elif not documents.one_per_row:
            mask = documents.mask
        return self._attend(q, k, v, mask), cache if return_cache else None

    def step(self, hidden: Tensor, cache: KeyValueCache) -> Tensor:
        """One token: hidden [B, D] -> [B, D]; `cache` is extended in place."""
        documents = Documents(cache.position[:, None].clone(), None, True)
        return self(hidden[:, None], documents, PlanRecord(), gate_temperature=1.0, cache=cache)[0][:, 0]

    def empty_cache(self, batch: int, max_tokens: int, *, device: torch.device | None = None) -> KeyValueCache:
        """Room for `max_tokens` tokens of `batch` sequences."""
        shape = (batch, max_tokens, self.model.num_key_heads, self.model.key_dim)
        keys = torch.zeros(shape, dtype=self.dtype, device=device)
        return KeyValueCache(keys, torch.zeros_like(keys), torch.zeros(batch, dtype=torch.int64, device=device))

    def _project(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = to_heads(split_heads(self.q(hidden), self.model.num_heads), self.context)
        k, v = (to_heads(split_heads(p(hidden), self.model.num_key_heads), self.context) for p in (self.k, self.v))
        base = self.model.rope_base
        return rotate(q, positions, base), rotate(k, positions, base), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [B, T, H, K], k and v [B, T', Hk, K], mask None (causal, T = T') -> [B, T, D]."""
        grouped = k.shape[2] != q.shape[2]
        read = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=grouped,
        )
        return self.out(to_time(read.transpose(1, 2), self.context).flatten(-2))
