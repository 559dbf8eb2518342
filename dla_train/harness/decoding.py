"""Greedy answers to many prompts of unequal length on the models' fixed-size caches, without padding.

Prompts of equal length are read together; then all caches of a batch are joined and every row takes its steps at its
own position. A recurrent memory has one size whatever its row's length, and attention keeps its rows' keys at the
right end of its store, so rows of unequal length stand beside each other exactly. Rows that are done leave the batch
once they are half of it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dla_kernels import MergeCache
from dla_train.models.attention import KeyValueCache
from dla_train.models.language_model import LanguageModel
from dla_train.models.mixer import Cache

Done = Callable[[list[int]], bool]
"""Whether an answer, so far, is finished."""


@torch.no_grad()
def answers(
    model: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: int,
    done: Done,
    *,
    batch_tokens: int,
    rows: int,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Likeliest continuations of up to `new_tokens`, batch by batch with the prompts' indices, longest first.

    done: asked of every answer after every token. rows: prompts at once, each with caches of its own.
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), prompts[index]))
    for begin in range(0, len(order), rows):
        chosen = order[begin : begin + rows]
        found = _answer_batch(model, [prompts[index] for index in chosen], new_tokens, done, batch_tokens)
        yield list(zip(chosen, found, strict=True))


def _answer_batch(
    model: LanguageModel, prompts: Sequence[tuple[int, ...]], new_tokens: int, done: Done, batch_tokens: int
) -> list[list[int]]:
    read = [_read(model, list(group), new_tokens, batch_tokens) for _, group in itertools.groupby(prompts, key=len)]
    logits = torch.cat([part for part, _ in read])
    caches = join([part for _, part in read])
    made: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    rows = list(range(len(prompts)))  # of the batch, by prompt
    while True:
        tokens = logits.argmax(-1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not finished[row]:
                made[row].append(token)
                finished[row] = len(made[row]) == new_tokens or done(made[row])
        going = [place for place, row in enumerate(rows) if not finished[row]]
        if not going:
            return made
        if 2 * len(going) <= len(rows):
            kept = torch.tensor(going, device=tokens.device)
            caches, tokens, rows = [take(cache, kept) for cache in caches], tokens[kept], [rows[i] for i in going]
        logits = model.step(tokens, caches)


def _read(
    model: LanguageModel, prompts: list[tuple[int, ...]], new_tokens: int, batch_tokens: int
) -> tuple[Tensor, list[Cache]]:
    """Prompts of one length: (logits [B, vocab] of the next token, caches), in chunks of up to batch_tokens."""
    tokens = torch.tensor(prompts, device=model.embedding.weight.device)
    caches = model.empty_caches(len(prompts), tokens.shape[1] + new_tokens)
    logits = None
    for piece in tokens.split(max(1, batch_tokens // len(prompts)), dim=1):
        out = model(piece, caches=caches, return_caches=True)
        assert out.caches is not None
        logits, caches = out.logits[:, -1], out.caches
    assert logits is not None, "a prompt has at least one token"
    return logits, caches


def join(groups: Sequence[list[Cache]]) -> list[Cache]:
    """The rows of several lists of caches (one cache a layer) behind each other."""
    return list(groups[0]) if len(groups) == 1 else [_join_layer(layer) for layer in zip(*groups, strict=True)]


def take(cache: Cache, rows: Tensor) -> Cache:
    """Some rows of a cache, in that order; shares nothing with it."""
    if isinstance(cache, KeyValueCache):
        return KeyValueCache(cache.keys[rows], cache.values[rows], cache.position[rows], cache.length)
    assert isinstance(cache, MergeCache)
    return dataclasses.replace(cache, **{name: tensor[rows] for name, tensor in _tensors(cache).items()})


def _join_layer(caches: Sequence[Cache]) -> Cache:
    first = caches[0]
    if isinstance(first, KeyValueCache):
        return _join_attention([cache for cache in caches if isinstance(cache, KeyValueCache)])
    assert isinstance(first, MergeCache)
    tensors = [_tensors(cache) for cache in caches if isinstance(cache, MergeCache)]
    return dataclasses.replace(first, **{name: torch.cat([one[name] for one in tensors]) for name in tensors[0]})


def _join_attention(caches: Sequence[KeyValueCache]) -> KeyValueCache:
    """Every row's store is moved to end where the longest one's ends; a query counts its keys from there back."""
    length = max(cache.length for cache in caches)
    room = length + max(cache.keys.shape[1] - cache.length for cache in caches)
    rows = sum(cache.keys.shape[0] for cache in caches)
    joined = KeyValueCache(
        caches[0].keys.new_zeros(rows, room, *caches[0].keys.shape[2:]),
        caches[0].values.new_zeros(rows, room, *caches[0].values.shape[2:]),
        torch.cat([cache.position for cache in caches]),
        length,
    )
    begin = 0
    for cache in caches:
        end = begin + cache.keys.shape[0]
        joined.keys[begin:end, length - cache.length : length] = cache.keys[:, : cache.length]
        joined.values[begin:end, length - cache.length : length] = cache.values[:, : cache.length]
        begin = end
    return joined


def _tensors(cache: MergeCache) -> dict[str, Tensor]:
    fields = ((item.name, getattr(cache, item.name)) for item in dataclasses.fields(cache))
    return {name: tensor for name, tensor in fields if tensor is not None}
