"""Continuing prompts: prefill in groups of equal length, one joined cache, and a batch that shrinks as rows end.

Nothing is padded. Prompts of one length go through the parallel forward together; their caches are then joined, which
merge caches of fixed size allow whatever the lengths (softmax attention's keys are aligned at their ends and masked),
and all rows are stepped as one batch. So with greedy choice a batch gives what each prompt gives alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dla_train.config_rules import longest_context
from dla_train.generate.errors import GenerationError
from dla_train.generate.sampling import Sampling, distribution, draw
from dla_train.models.language_model import LanguageModel
from dla_train.models.mixer import Cache

PREFILL_CHUNK_TOKENS = 2048
"""Tokens of a prompt that go through the model at once; bounds the memory of activations and logits."""
BATCH_ROWS = 16
"""Prompts that are decoded together."""
OnToken = Callable[[int, int], bool]
"""(prompt's index, new token) -> whether this prompt ends with it."""
OnPrompt = Callable[[Sequence[int], list[Cache]], None]
"""(indices of prompts of one length, their caches [B, ...] after the last prompt token, before any step)."""


@dataclass
class Continuation:
    """What follows one prompt."""

    tokens: list[int] = field(default_factory=list)
    """New tokens; the one that ended it is the last."""
    ended_by: str = "length"
    """`length`, `stop_token` or `listener`."""


@dataclass
class Continued:
    """Continuations of all prompts, and what making them took."""

    continuations: list[Continuation]
    """In the prompts' order."""
    cache_bytes: int = 0
    """Largest bytes of a batch's caches, all layers."""
    prompt_tokens: int = 0
    """Tokens of all prompts."""
    prefill_seconds: float = 0.0
    """Wall time of the prompts."""
    stepped_tokens: int = 0
    """Tokens fed in one by one: every new token but each prompt's last."""
    decode_seconds: float = 0.0
    """Wall time of drawing and stepping."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Speed of reading prompts; 0 where there was nothing to read."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of decoding, all rows of a batch counted; 0 where nothing was stepped."""
        return self.stepped_tokens / self.decode_seconds if self.decode_seconds else 0.0


@torch.no_grad()
def prefill(
    model: LanguageModel, tokens: Tensor, caches: list[Cache], *, chunk_tokens: int = PREFILL_CHUNK_TOKENS
) -> tuple[Tensor, list[Cache]]:
    """Read tokens [B, T] on from `caches`: (logits of the next token [B, vocab], caches after the last token).

    Raises GenerationError where there are no tokens.
    """
    logits = None
    for piece in tokens.split(chunk_tokens, dim=1):
        if piece.shape[1]:
            last = torch.arange(1, len(piece) + 1, device=piece.device) * piece.shape[1] - 1
            out = model(piece, caches=caches, return_caches=True, positions=last)
            assert out.caches is not None
            logits, caches = out.logits, out.caches
    if logits is None:
        raise GenerationError("the prompt is empty; give at least one token")
    return logits, caches


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    stop_ids: frozenset[int] = frozenset(),
    batch_rows: int = BATCH_ROWS,
    on_token: OnToken | None = None,
    on_prompt: OnPrompt | None = None,
) -> Continued:
    """Continue every prompt (token ids) by up to `max_new_tokens` tokens, ended early by one of `stop_ids`.

    Prompt i is drawn with seed + i, so it gives the same tokens alone and in any batch. Default sampling: from the
    model's distribution as it is. Raises GenerationError for an empty prompt, a token outside the vocabulary, a context
    longer than a log_linear memory holds, and counts out of range, before anything is computed. The model is left in
    the mode (train or eval) it was in.
    """
    _check(model, prompts, max_new_tokens, batch_rows)
    result = Continued([Continuation() for _ in prompts])
    decoding = _Decoding(
        model, prompts, max_new_tokens, sampling or Sampling(), seed, stop_ids, on_token, on_prompt, result
    )
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(prompts), batch_rows):
            decoding.batch(list(range(first, min(first + batch_rows, len(prompts)))))
    finally:
        model.train(was_training)
    return result


def _check(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_rows: int) -> None:
    if max_new_tokens < 0 or batch_rows < 1:
        rule = "max_new_tokens must be at least 0 and batch_rows at least 1"
        raise GenerationError(f"max_new_tokens={max_new_tokens}, batch_rows={batch_rows}: {rule}")
    vocab_size, memory = model.model_config.vocab_size, model.memory_config
    longest = longest_context(memory)
    for number, prompt in enumerate(prompts):
        which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise GenerationError(f"{which} is empty; give at least one token")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            rule = f"outside the model's vocabulary of {vocab_size}"
            raise GenerationError(f"{which} has tokens {wrong[:4]} {rule}; use the run's tokenizer")
        needed = len(prompt) + max_new_tokens
        if longest is not None and needed > longest:
            raise GenerationError(
                f"{which} has {len(prompt)} tokens, with {max_new_tokens} new ones more than the "
                f"{longest} that a log_linear memory of memory.capacity={memory.capacity} holds; "
                "shorten it, or ask for fewer new tokens"
            )


@dataclass
class _Decoding:
    """One call of `generate`."""

    model: LanguageModel
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop_ids: frozenset[int]
    on_token: OnToken | None
    on_prompt: OnPrompt | None
    result: Continued

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    def batch(self, rows: list[int]) -> None:
        """Prefill and decode the prompts numbered `rows`."""
        started = time.perf_counter()
        order, logits, caches = self._read(rows)
        if self.device.type == "cuda":  # else what the prompt takes would be counted as decoding
            torch.cuda.synchronize(self.device)
        read = time.perf_counter()
        self.result.cache_bytes = max(self.result.cache_bytes, sum(cache.nbytes for cache in caches))
        self.result.prompt_tokens += sum(len(self.prompts[row]) for row in rows)
        self.result.prefill_seconds += read - started
        if self.max_new_tokens:
            self._decode(order, logits, caches)
        self.result.decode_seconds += time.perf_counter() - read

    def _read(self, rows: list[int]) -> tuple[list[int], Tensor, list[Cache]]:
        """(rows in their new order, logits [B, vocab], caches of them all)."""
        lengths: dict[int, list[int]] = {}
        for row in rows:
            lengths.setdefault(len(self.prompts[row]), []).append(row)
        logits, groups = [], []
        for length, group in lengths.items():
            empty = self.model.empty_caches(len(group), length + self.max_new_tokens)
            tokens = torch.tensor([list(self.prompts[row]) for row in group], device=self.device)
            scores, caches = prefill(self.model, tokens, empty)
            if self.on_prompt is not None:
                self.on_prompt(group, caches)
            logits.append(scores)
            groups.append(caches)
        joined = groups[0] if len(groups) == 1 else [layer[0].join(layer) for layer in zip(*groups, strict=True)]
        return [row for group in lengths.values() for row in group], torch.cat(logits), joined

    def _decode(self, rows: list[int], logits: Tensor, caches: list[Cache]) -> None:
        generators = {row: torch.Generator().manual_seed(self.seed + row) for row in rows}
        seen = self._seen(rows)
        while True:
            uniform = torch.tensor([torch.rand((), generator=generators[row], dtype=torch.float64) for row in rows])
            tokens = draw(distribution(logits, self.sampling, seen), uniform)
            kept = [place for place, token in enumerate(tokens.tolist()) if not self._take(rows[place], token)]
            if not kept:
                return
            if len(kept) < len(rows):
                index = torch.tensor(kept, device=self.device)
                rows, tokens = [rows[place] for place in kept], tokens[index]
                caches = [cache.take(index) for cache in caches]
                seen = seen[index] if seen is not None else None
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            logits = self.model.step(tokens, caches)
            self.result.stepped_tokens += len(rows)

    def _take(self, row: int, token: int) -> bool:
        """Add a token to a prompt's continuation; whether it ends there."""
        continuation = self.result.continuations[row]
        continuation.tokens.append(token)
        if token in self.stop_ids:
            continuation.ended_by = "stop_token"
        elif self.on_token is not None and self.on_token(row, token):
            continuation.ended_by = "listener"
        return continuation.ended_by != "length" or len(continuation.tokens) == self.max_new_tokens

    def _seen(self, rows: list[int]) -> Tensor | None:
        """[B, vocab] bool: the prompts' tokens, where there is a penalty for them."""
        if self.sampling.repetition_penalty == 1:
            return None
        seen = torch.zeros(len(rows), self.model.model_config.vocab_size, dtype=torch.bool, device=self.device)
        for place, row in enumerate(rows):
            seen[place, torch.tensor(list(self.prompts[row]), device=self.device)] = True
        return seen
