"""Decoding at contexts from 1K to 64K: time of a token and bytes of the caches, recurrent memories beside attention.

A memory of fixed size should take as long for the 65,537th token as for the 1,025th; softmax attention reads all keys
it has kept. Caches come from a real prefill in chunks. Attention's prefill grows with the square of the context, so
beyond `--attention-prefill` tokens its cache is filled with random keys and values, which take as long to read; at the
longest context that has both they are timed beside each other.

Times are processor time of one thread: what an idle machine would take on the clock, and on a shared one far steadier
than the clock. Writes decode.json, decode.md and a picture.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from dla_kernels.markdown import markdown_table
from dla_train.bench.cpu import environment, measure_in_turn
from dla_train.config import MemoryConfig, ModelConfig
from dla_train.generate import prefill
from dla_train.models.attention import KeyValueCache
from dla_train.models.init import init_weights
from dla_train.models.language_model import LanguageModel
from dla_train.models.mixer import Cache

RESULTS, PAGE, PICTURE = "decode.json", "decode.md", "decode_context.png"
ARMS: dict[str, tuple[str, MemoryConfig]] = {
    "Gated DeltaNet x dla": ("gated_deltanet", MemoryConfig(policy="dla", tau=1.3)),
    "Gated DeltaNet x single": ("gated_deltanet", MemoryConfig(policy="single", capacity=1, read="unit")),
    "Mamba-2 x dla": ("mamba2", MemoryConfig(policy="dla", tau=1.3)),
    "Mamba-2 x single": ("mamba2", MemoryConfig(policy="single", capacity=1, read="unit")),
    "Transformer": ("attention", MemoryConfig(policy="none", read="unit")),
}
"""Backbone and memory of every measured model."""
LINES = (("tab:red", "o-"), ("tab:orange", "o-"), ("tab:blue", "x--"), ("tab:cyan", "x--"), ("0.35", "s-"))
"""Colour and line of each."""
FLAT = 1.15
"""Largest ratio of the longest context's time to the shortest's that counts as flat on a shared machine."""


@dataclass(frozen=True)
class Place:
    """A model at a context."""

    arm: str
    context: int
    filled: bool
    """Whether the cache was filled with random numbers instead of by a prefill."""
    model: LanguageModel
    caches: list[Cache]


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(prog="python -m dla_train.bench decode", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder (default %(default)s)")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="folder (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds (default %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded in a round (default %(default)s)")
    parser.add_argument("--longest", type=int, default=65536, help="longest context (default %(default)s)")
    parser.add_argument("--attention-prefill", type=int, default=8192, help="tokens attention reads in earnest")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = measure(options.longest, options.attention_prefill, rounds=options.rounds, steps=options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output / PAGE).write_text(page(results), encoding="utf-8")
    plot(results, options.images / PICTURE)
    print(page(results))
    return 0


def model_config(backbone: str) -> ModelConfig:
    """The measured shape: 4 heads of 64 x 64, so that a state is as large as 64 keys and values of a head are."""
    return ModelConfig(
        name="decode",
        backbone=backbone,
        vocab_size=2048,
        width=256,
        num_layers=2,
        num_heads=4,
        num_key_heads=4,
        key_dim=64,
        value_dim=64,
        mlp_width=512,
        conv_width=0 if backbone == "attention" else 4,
    )


@torch.no_grad()
def measure(longest: int, attention_prefill: int, *, rounds: int, steps: int) -> dict[str, Any]:
    """Prefill every arm, then time decoding at every context, all in turn."""
    contexts = [1024 * 2**power for power in range(20) if 1024 * 2**power <= longest]
    places, prefills = list[Place](), list[dict[str, Any]]()
    for arm, (backbone, memory) in ARMS.items():
        model = init_weights(LanguageModel(model_config(backbone), memory), 0).eval()
        read = [context for context in contexts if backbone != "attention" or context <= attention_prefill]
        found, seconds = _prefilled(arm, model, read, steps)
        places += found
        prefills += seconds
        if backbone == "attention":
            places += [_filled(arm, model, context, steps) for context in contexts if context >= max(read)]
    things = {_label(place): functools.partial(_decode, place, steps) for place in places}
    timings = measure_in_turn(things, rounds)
    return {
        "environment": environment() | {"shape": "2 layers, width 256, 4 heads, K = V = 64, batch 1, float32"},
        "steps": steps,
        "rounds": rounds,
        "prefill": prefills,
        "decode": [
            {
                "arm": place.arm,
                "context": place.context,
                "filled": place.filled,
                "cache_bytes": sum(cache.nbytes for cache in place.caches),
                "milliseconds": [1e3 * seconds / steps for seconds in timings[_label(place)].rounds],
            }
            for place in places
        ],
    }


def _label(place: Place) -> str:
    return f"{place.arm} at {_short(place.context)}{'*' if place.filled else ''}"


def _prefilled(
    arm: str, model: LanguageModel, contexts: list[int], steps: int
) -> tuple[list[Place], list[dict[str, Any]]]:
    """Caches at every context of one prefill, and the speed of each stretch of it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.model_config.vocab_size, (1, contexts[-1]), generator=generator)
    caches, done = model.empty_caches(1, contexts[-1] + steps), 0
    places, speeds = list[Place](), list[dict[str, Any]]()
    for context in contexts:
        started = time.process_time()
        _, caches = prefill(model, tokens[:, done:context], caches)
        speed = (context - done) / (time.process_time() - started)
        speeds.append({"arm": arm, "from": done, "to": context, "tokens_per_second": speed})
        places.append(Place(arm, context, False, model, _kept(caches, context + steps)))
        done = context
    return places, speeds


def _kept(caches: list[Cache], tokens: int) -> list[Cache]:
    """Copies with room for `tokens` tokens; only attention's depend on it."""
    row = torch.tensor([0])
    return [
        KeyValueCache(c.keys[:, :tokens].clone(), c.values[:, :tokens].clone(), c.position.clone(), c.length)
        if isinstance(c, KeyValueCache)
        else c.take(row)
        for c in caches
    ]


def _filled(arm: str, model: LanguageModel, context: int, steps: int) -> Place:
    generator = torch.Generator().manual_seed(0)
    caches = model.empty_caches(1, context + steps)
    for cache in caches:
        assert isinstance(cache, KeyValueCache)
        for tensor in (cache.keys, cache.values):
            tensor[:, :context] = torch.randn(tensor[:, :context].shape, generator=generator)
        cache.position.fill_(context)
        cache.length = context
    return Place(arm, context, True, model, caches)


@torch.no_grad()
def _decode(place: Place, steps: int) -> float:
    """Seconds of `steps` tokens from the context on; the place's caches stay where they were."""
    caches: list[Cache] = []
    for cache in place.caches:
        if isinstance(cache, KeyValueCache):  # not copied: what is written behind the context is written over
            caches.append(KeyValueCache(cache.keys, cache.values, cache.position.clone(), cache.length))
        else:
            caches.append(cache.take(torch.tensor([0])))
    token = torch.tensor([1])
    started = time.process_time()
    for _ in range(steps):
        token = place.model.step(token, caches).argmax(-1)
    return time.process_time() - started


def growth(results: dict[str, Any], arm: str) -> list[float]:
    """Time of a token at the longest context over that at the shortest, in every round: [least, median, most]."""
    lines = [line for line in results["decode"] if line["arm"] == arm]
    first, last = (chosen(lines, key=lambda line: line["context"]) for chosen in (min, max))
    ratios = sorted(b / a for a, b in zip(first["milliseconds"], last["milliseconds"], strict=True))
    return [ratios[0], statistics.median(ratios), ratios[-1]]


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    env = results["environment"]
    contexts = sorted({line["context"] for line in results["decode"]})
    sections = [
        "# Decoding at long contexts, on a CPU",
        "Made by `python -m dla_train.bench decode`; numbers in decode.json.",
        f"{env['shape']}, random weights; torch {env['torch']}, {env['threads']} threads, Python {env['python']}. "
        f"Milliseconds of processor time a token: medians of {results['rounds']} rounds of {results['steps']} tokens, "
        f"timed in turn. The ratio is taken in each round: median, least to most; a median of at most {FLAT} is flat.",
        _times_table(results, contexts),
        _bytes_table(results, contexts),
        "\n".join(["* cache filled with random keys and values instead of by a prefill.", *_check_line(results)]),
        _prefill_table(results, contexts),
        f"![Decoding at long contexts](../images/{PICTURE})",
    ]
    return "\n\n".join(sections) + "\n"


def _times_table(results: dict[str, Any], contexts: list[int]) -> str:
    rows = []
    for arm in ARMS:
        least, ratio, most = growth(results, arm)
        cells = [_cell(results, arm, context) for context in contexts]
        rows.append([arm, *cells, f"{ratio:.2f} ({least:.2f} to {most:.2f})", "yes" if ratio <= FLAT else "no"])
    return markdown_table(["ms a token at", *map(_short, contexts), "longest / shortest", "flat"], rows)


def _bytes_table(results: dict[str, Any], contexts: list[int]) -> str:
    rows = []
    for arm in ARMS:
        held = {line["context"]: line["cache_bytes"] for line in results["decode"] if line["arm"] == arm}
        rows.append([arm, *(f"{held[context]:,}" for context in contexts)])
    return markdown_table(["cache bytes at", *map(_short, contexts)], rows)


def _prefill_table(results: dict[str, Any], contexts: list[int]) -> str:
    rows = []
    for arm in ARMS:
        speeds = {line["to"]: f"{line['tokens_per_second']:,.0f}" for line in results["prefill"] if line["arm"] == arm}
        rows.append([arm, *(speeds.get(context, "") for context in contexts)])
    head = ["prefill, tokens a second of processor time", *(f"to {_short(context)}" for context in contexts)]
    return markdown_table(head, rows)


def _cell(results: dict[str, Any], arm: str, context: int) -> str:
    """The prefilled cache's time where there is one."""
    found = [line for line in results["decode"] if (line["arm"], line["context"]) == (arm, context)]
    line = min(found, key=lambda line: line["filled"])
    return f"{statistics.median(line['milliseconds']):.2f}{'*' if line['filled'] else ''}"


def _check_line(results: dict[str, Any]) -> list[str]:
    """How a filled cache's time compares with a prefilled one's where both were measured."""
    by_place: dict[tuple[str, int], dict[bool, float]] = {}
    for line in results["decode"]:
        times = by_place.setdefault((line["arm"], line["context"]), {})
        times[line["filled"]] = statistics.median(line["milliseconds"])
    both = {place: times for place, times in by_place.items() if len(times) == 2}
    return [
        f"At {_short(context)} such a cache took {times[True] / times[False]:.2f} times as long as a prefilled one."
        for (_, context), times in both.items()
    ]


def _short(context: int) -> str:
    return f"{context // 1024}K"


def plot(results: dict[str, Any], path: Path) -> None:
    """Time and bytes against the context."""
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for arm, (colour, line) in zip(ARMS, LINES, strict=True):
        lines = {line["context"]: line for line in results["decode"] if line["arm"] == arm}
        contexts = sorted(lines)
        times = [lines[context]["milliseconds"] for context in contexts]
        middle = [statistics.median(rounds) for rounds in times]
        panels[0].plot(contexts, middle, line, color=colour, markersize=4, label=arm)
        panels[0].fill_between(contexts, [min(r) for r in times], [max(r) for r in times], color=colour, alpha=0.15)
        panels[1].plot(contexts, [lines[c]["cache_bytes"] / 2**20 for c in contexts], line, color=colour, markersize=4)
    ticks = sorted({line["context"] for line in results["decode"]})
    for axes, label in zip(panels, ("milliseconds of one core a token", "MiB of caches"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [_short(tick) for tick in ticks])
        axes.set_xlabel("context (tokens)")
        axes.set_title(label, fontsize=10, loc="left")
        axes.grid(alpha=0.25)
    panels[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
