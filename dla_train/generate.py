"""Sampling from a trained model: the prompt in chunks by the parallel forward, then token by token on the caches.

A recurrent model's caches are preallocated and never grow; their bytes and the decoding speed are reported. Boundaries
are hard. Console script `dla-generate`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dla_train.data.shard_list import trained_with_bos
from dla_train.data.tokenizer import load_tokenizer
from dla_train.evaluate.loading import load_model
from dla_train.models.language_model import LanguageModel
from dla_train.models.mixer import Cache

PREFILL_CHUNK_TOKENS = 2048
"""Tokens of a prompt that go through the model at once; bounds the memory of activations and logits."""


@dataclass(frozen=True)
class Generation:
    """New tokens and what making them took."""

    tokens: list[int]
    """The new tokens, without the prompt."""
    cache_bytes: int
    """Bytes of all layers' caches."""
    prefill_seconds: float
    """Wall time of the prompt."""
    decode_seconds: float
    """Wall time of the new tokens."""

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed."""
        return len(self.tokens) / self.decode_seconds if self.decode_seconds else 0.0


@torch.no_grad()
def prefill(
    model: LanguageModel, tokens: Tensor, caches: list[Cache], *, chunk_tokens: int = PREFILL_CHUNK_TOKENS
) -> tuple[Tensor, list[Cache]]:
    """Read tokens [B, T] on from `caches`: (logits of the next token [B, vocab], caches after the last token)."""
    logits = None
    for piece in tokens.split(chunk_tokens, dim=1):
        out = model(piece, caches=caches, return_caches=True)
        assert out.caches is not None
        logits, caches = out.logits[:, -1], out.caches
    if logits is None:
        raise ValueError("the prompt is empty; give at least one token")
    return logits, caches


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw from logits [B, vocab] -> tokens [B] int64. Temperature 0 is greedy; top_k 0 and top_p 1 keep everything.

    top_p keeps the smallest set of most likely tokens whose probability reaches it (Holtzman et al. 2020).
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        given = f"temperature={temperature}, top_k={top_k}, top_p={top_p}"
        raise ValueError(f"{given}: temperature and top_k must be at least 0, and top_p above 0 and at most 1")
    if temperature == 0:
        return logits.argmax(-1)
    scaled, order = (logits.float() / temperature).sort(-1, descending=True)
    if top_k:
        scaled[:, top_k:] = -torch.inf
    probabilities = scaled.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    *,
    stop_id: int | None = None,
) -> Generation:
    """Continue `prompt_ids` by up to `max_new_tokens` tokens; `stop_id` (kept as the last token) ends it early.

    The same seed gives the same tokens on the same device. Raises ValueError for an empty prompt, a token outside the
    vocabulary, or illegal sampling settings. The model is left in the mode (train or eval) it was in.
    """
    _check_prompt(prompt_ids, model.model_config.vocab_size)
    generator = torch.Generator(device=model.embedding.weight.device).manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        return sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)

    was_training = model.training
    model.eval()
    try:
        return _continue(model, prompt_ids, max_new_tokens, draw, stop_id)
    finally:
        model.train(was_training)


def _check_prompt(prompt_ids: list[int], vocab_size: int) -> None:
    if not prompt_ids:
        raise ValueError("the prompt is empty; give at least one token")
    wrong = [token for token in prompt_ids if not 0 <= token < vocab_size]
    if wrong:
        rule = f"lie outside the model's vocabulary of {vocab_size}"
        raise ValueError(f"prompt tokens {wrong[:4]} {rule}; use the run's tokenizer")


def _continue(
    model: LanguageModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    draw: Callable[[Tensor], Tensor],
    stop_id: int | None,
) -> Generation:
    """Prefill, then draw and step until the length or the stop token is reached."""
    device = model.embedding.weight.device
    started = time.perf_counter()
    caches = model.empty_caches(1, len(prompt_ids) + max_new_tokens)
    logits, caches = prefill(model, torch.tensor([prompt_ids], device=device), caches)
    read = time.perf_counter()
    tokens: list[int] = []
    while len(tokens) < max_new_tokens and (not tokens or tokens[-1] != stop_id):
        if tokens:
            logits = model.step(torch.tensor(tokens[-1:], device=device), caches)
        tokens.append(int(draw(logits).item()))
    done = time.perf_counter()
    return Generation(tokens, sum(cache.nbytes for cache in caches), read - started, done - read)


def main(arguments: list[str] | None = None) -> None:
    """Console entry: sample from the latest checkpoint of a run."""
    parser = argparse.ArgumentParser(prog="dla-generate", description="Sample text from a run's latest checkpoint.")
    parser.add_argument("--run", type=Path, required=True, help="run folder (config and checkpoints)")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k most likely tokens; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the most likely tokens up to this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin with BOS; by default as the training files' manifest says",
    )
    options = parser.parse_args(arguments)
    try:
        _sample_run(options)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"dla-generate: {error}") from error


def _sample_run(options: argparse.Namespace) -> None:
    model, config, step = load_model(options.run)
    tokenizer = load_tokenizer(config.data.tokenizer)
    prompt = tokenizer.encode(options.prompt)
    if tokenizer.bos_id is not None and (trained_with_bos(config.data) if options.bos is None else options.bos):
        prompt = [tokenizer.bos_id, *prompt]
    sampling = (options.temperature, options.top_k, options.top_p, options.seed)
    result = generate(model, prompt, options.max_new_tokens, *sampling, stop_id=tokenizer.eos_id)
    print(tokenizer.decode(prompt + result.tokens))
    counts = f"{len(prompt)} prompt and {len(result.tokens)} new tokens, {result.tokens_per_second:.1f} tokens/s"
    name = f"{config.model.name} x {config.memory.policy}, step {step}"
    print(f"[{name}: {counts}, caches {result.cache_bytes:,} bytes]", file=sys.stderr)


if __name__ == "__main__":
    main()
