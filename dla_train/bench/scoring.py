"""Speed of log-likelihood scoring, as `dla-evaluate` does it, against plain forwards over as many tokens.

Two sets of requests: answers to short questions of unequal length, and passages. In every round the same things are
timed in turn: plain forwards over rows that need no padding, which take no scores; scoring; the forwards of scoring
alone, to tell padding from the rest; and some of the rows behind each other, as documents of one row, the alternative
to padding. The model is freshly initialised: speed does not depend on what it has learnt.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dla_kernels.markdown import markdown_table
from dla_train.bench.cpu import measure_in_turn
from dla_train.harness.scoring import Request, batches, padded, score
from dla_train.hydra_app import compose
from dla_train.models.build import build_model
from dla_train.models.language_model import LanguageModel

RESULTS = "scoring.json"
MODELS = (("mamba2_tiny", "single"), ("gated_deltanet_tiny", "dla"))
LENGTHS = {"questions": (16, 96), "passages": (128, 1024)}
"""Tokens of a request, between which lengths are even."""
TARGET_TOKENS = 4
"""Scored tokens of a request, as of a multiple-choice answer."""
PACKED_TOKENS = 512
"""Tokens of the rows that are packed: on a CPU a memory decides about a row's tokens one after the other."""
LEAST = 0.85
"""Share of the plain forwards' speed that scoring is to reach."""


def main(arguments: Sequence[str]) -> int:
    """Measure and write scoring.json and scoring.md."""
    parser = argparse.ArgumentParser(prog="python -m dla_train.bench scoring", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=12_000, help="tokens of a set of requests (default %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens of a batch (default %(default)s)")
    options = parser.parse_args(arguments)
    measured = [
        measure(model, memory, kind, options.tokens, options.batch_tokens, options.rounds)
        for model, memory in MODELS
        for kind in LENGTHS
    ]
    results = {"environment": _environment(), "batch_tokens": options.batch_tokens, "measured": measured}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output / "scoring.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    return 0


def measure(model: str, memory: str, kind: str, tokens: int, batch_tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each thing in every round, padding not counted as tokens."""
    config = compose(["experiment=quickstart", f"model={model}", f"memory={memory}"])
    built = build_model(config, "cuda" if torch.cuda.is_available() else "cpu").eval()
    requests = make_requests(kind, tokens, config.model.vocab_size)
    rows = sorted((request.inputs for request in requests), key=len, reverse=True)
    total = sum(map(len, rows))
    mean = total // len(rows)
    flat = [token for row in rows for token in row]
    some = rows[:: -(-total // PACKED_TOKENS)]
    even = [tuple(flat[begin : begin + mean]) for begin in range(0, total - mean + 1, mean)]
    timings = measure_in_turn(
        {
            "plain": lambda: _seconds(lambda: _forwards(built, even, batch_tokens)),
            "scoring": lambda: _seconds(lambda: list(score(built, requests, batch_tokens=batch_tokens))),
            "padded": lambda: _seconds(lambda: _forwards(built, rows, batch_tokens)),
            "packed": lambda: _seconds(lambda: _packed(built, some, batch_tokens)),
        },
        rounds,
    )
    grid = sum(len(batch) * len(batch[0]) for batch in batches(rows, batch_tokens))
    counted = {"plain": mean * len(even), "scoring": total, "padded": total, "packed": sum(map(len, some))}
    speeds = {name: [counted[name] / seconds for seconds in timing.rounds] for name, timing in timings.items()}
    return {"model": model, "memory": memory, "requests": kind, "count": len(rows), "tokens": total,
            "padding": grid / total - 1, "tokens_per_second": speeds}  # fmt: skip


def make_requests(kind: str, tokens: int, vocab_size: int) -> list[Request]:
    """Distinct requests of unequal length, of about `tokens` together."""
    generator = torch.Generator().manual_seed(0)
    least, most = LENGTHS[kind]
    made: list[Request] = []
    while sum(len(request.inputs) for request in made) < tokens:
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        row = torch.randint(3, vocab_size, (length + 1,), generator=generator).tolist()
        made.append(Request(tuple(row[:-1]), tuple(row[-TARGET_TOKENS:])))
    return made


@torch.no_grad()
def _forwards(model: LanguageModel, rows: Sequence[tuple[int, ...]], batch_tokens: int) -> None:
    for batch in batches(rows, batch_tokens):
        model(padded(batch, model.embedding.weight.device))


@torch.no_grad()
def _packed(model: LanguageModel, rows: Sequence[tuple[int, ...]], batch_tokens: int) -> None:
    """Rows behind each other, as many as fit into a row of batch_tokens."""
    device, begin = model.embedding.weight.device, 0
    while begin < len(rows):
        end, offsets = begin, [0]
        while end < len(rows) and (end == begin or offsets[-1] + len(rows[end]) <= batch_tokens):
            offsets.append(offsets[-1] + len(rows[end]))
            end += 1
        tokens = torch.tensor([[token for row in rows[begin:end] for token in row]], device=device)
        model(tokens, torch.tensor(offsets, device=device))
        begin = end


def _seconds(work: Any) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def _environment() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(results: dict[str, Any]) -> str:
    """The page of scoring.json."""
    env = results["environment"]
    head = ["model, memory", "requests", "padding", "plain, tokens/s"]
    head += ["scoring", "forwards alone", "packed rows", "target"]
    sections = [
        "# Scoring log-likelihoods",
        f"Made by `python -m dla_train.bench scoring`; {env['device']}, {env['threads']} threads, "
        f"torch {env['torch']}, Python {env['python']}, float32, batches of {results['batch_tokens']} tokens. "
        "Shares of the speed of plain forwards over as many tokens without padding and without scores, timed in turn: "
        f"median over rounds (lowest to highest). The target is {LEAST:.0%}. Padding is not counted as tokens.",
        markdown_table(head, map(_row, results["measured"])),
    ]
    return "\n\n".join(sections) + "\n"


def _row(one: dict[str, Any]) -> list[str]:
    speeds = one["tokens_per_second"]
    shares = {
        name: [mine / plain for mine, plain in zip(speeds[name], speeds["plain"], strict=True)]
        for name in ("scoring", "padded", "packed")
    }
    return [
        f"{one['model']}, {one['memory']}",
        f"{one['count']} {one['requests']}, {one['tokens']:,} tokens",
        f"{one['padding']:.1%}",
        f"{statistics.median(speeds['plain']):,.0f}",
        *(f"{statistics.median(all_):.0%} ({min(all_):.0%} to {max(all_):.0%})" for all_ in shares.values()),
        "met" if statistics.median(shares["scoring"]) >= LEAST else "**missed**",
    ]
