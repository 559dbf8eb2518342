"""Speed on the CPU, measured side by side in one run: writes docs/results/speed.json and speed.md.

Timings on shared machines are noisy, so every claim is a ratio of things timed in turn in one process, and the spread
over the rounds stands beside it. Nothing here is a test: a target that is missed is written down as missed.
"""

from __future__ import annotations

import functools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.stdlib_files import prepare_stdlib_files
from dla_kernels import dla_attention, plan_memory
from dla_kernels.bench.inputs import TAU, Shape, boundary_rate, layer_inputs
from dla_kernels.markdown import markdown_table
from dla_train.hydra_app import compose
from dla_train.trackers import METRICS_FILE, read_lines
from dla_train.train import train

BACKBONES = ("mamba2", "gated_deltanet")
CAPACITY = 30


@dataclass(frozen=True)
class Size:
    """Heads and dimensions of a measured layer; every head has its own key."""

    heads: int
    key_dim: int
    value_dim: int

    def __str__(self) -> str:
        return f"H {self.heads}, K {self.key_dim}, V {self.value_dim}"

    def of(self, backbone: str) -> Shape:
        """The layer's shape on a backbone."""
        return Shape(backbone, self.heads, self.heads, self.key_dim, self.value_dim)


SMALL, LARGE = Size(4, 32, 32), Size(8, 64, 64)


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing over several rounds."""

    rounds: list[float]

    @property
    def median(self) -> float:
        """Seconds of the middle round."""
        return statistics.median(self.rounds)

    def report(self) -> dict[str, float]:
        return {"median_seconds": self.median, "least_seconds": min(self.rounds), "most_seconds": max(self.rounds)}


def layer_seconds(backbone: str, tokens: int, backend: str, *, size: Size = SMALL, backward: bool) -> float:
    """Seconds of one dla layer, plan and mixing, with or without its gradients."""
    x = layer_inputs(size.of(backbone), 1, tokens)
    weights = torch.ones(1, tokens, size.heads, CAPACITY, requires_grad=backward)
    with torch.set_grad_enabled(backward):
        started = time.perf_counter()
        plan = plan_memory(*x.keys, tau=TAU, capacity=CAPACITY, backend=backend)
        o = dla_attention(x.q, *x.keys, read_weights=weights, plan=plan, backend=backend)
        if backward:
            assert isinstance(o, Tensor)
            o.sum().backward()
    return time.perf_counter() - started


def measure_in_turn(things: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Time every thing once a round, after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for number in tqdm(range(rounds + 1), desc=", ".join(things)[:60], leave=False):
        for name, thing in things.items():
            spent = thing()
            if number:
                seconds[name].append(spent)
    return {name: Timing(rounds_) for name, rounds_ in seconds.items()}


def against_token_loop(rounds: int) -> dict[str, Any]:
    """Chunkwise form against the token loop at T = 2048. Target: 20 times.

    The token loop's backward keeps every token's states; of the large shape these fill a laptop, so forward alone.
    """
    results: dict[str, Any] = {}
    for backbone in BACKBONES:
        for size, backward in ((SMALL, False), (SMALL, True), (LARGE, False)):
            things = {
                backend: functools.partial(layer_seconds, backbone, 2048, backend, size=size, backward=backward)
                for backend in ("torch", "recurrent")
            }
            timings = measure_in_turn(things, rounds)
            ratio = timings["recurrent"].median / timings["torch"].median
            name = f"{backbone}, {size}, {'forward and backward' if backward else 'forward'}"
            rate = boundary_rate(layer_inputs(size.of(backbone), 1, 2048), TAU, "torch")
            results[name] = {"ratio": ratio, "boundary_rate": rate} | {k: t.report() for k, t in timings.items()}
    return results


def growth_with_length(rounds: int, lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)) -> dict[str, Any]:
    """time(2T) / time(T) of the chunkwise form, forward and backward. Target: at most 2.2."""
    results: dict[str, Any] = {}
    for backbone in BACKBONES:
        things = {str(t): functools.partial(layer_seconds, backbone, t, "torch", backward=True) for t in lengths}
        timings = measure_in_turn(things, rounds)
        pairs = zip(lengths, lengths[1:], strict=False)
        results[backbone] = {
            "ratios": {f"{b}/{a}": timings[str(b)].median / timings[str(a)].median for a, b in pairs}
        } | {name: timing.report() for name, timing in timings.items()}
    return results


def trainer_overhead(steps: int) -> dict[str, Any]:
    """Share of a step that is not forward, backward or optimizer, over the quickstart's run. Target: under 5%."""
    quickstart = compose(["experiment=quickstart"])
    prepare_stdlib_files(quickstart.data.tokenizer, quickstart.model.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        train(
            compose(
                [
                    "experiment=quickstart",
                    f"run_dir={folder}/run",
                    f"train.stop_at_step={steps}",
                    "train.validation_interval_steps=0",
                    "logging.interval_steps=1",
                    "logging.progress=false",
                    "train.device=cpu",
                ]
            )
        )
        lines = [line for line in read_lines(Path(folder, "run", METRICS_FILE)) if "overhead" in line]
    shares = [line["overhead"] for line in lines[2:]]
    return {"median": statistics.median(shares), "least": min(shares), "most": max(shares), "steps": len(shares)}


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shape": f"B 1, capacity {CAPACITY}, tau {TAU}, float32; lengths are measured with {SMALL}",
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    env, share = results["environment"], results["trainer_overhead"]
    loop = [
        [name, f"{r['boundary_rate']:.2f}", f"{r['ratio']:.0f}", "20"]
        for name, r in results["against_token_loop"].items()
    ]
    growth = [
        [f"{backbone}, {pair}", f"{ratio:.2f}", "2.2"]
        for backbone, r in results["growth_with_length"].items()
        for pair, ratio in r["ratios"].items()
    ]
    everything = (
        f"everything but forward, backward and step ({share['steps']} steps; least {share['least']:.1%}, "
        f"most {share['most']:.1%})"
    )
    compared = ["torch backend against the token loop, T = 2048", "boundaries per token", "times faster", "target"]
    sections = [
        "# Speed on the CPU",
        "Made by `make bench`; numbers in speed.json.",
        f"{env['shape']}; torch {env['torch']}, {env['threads']} threads, Python {env['python']}. Medians over rounds "
        "timed in turn.",
        markdown_table(compared, loop),
        markdown_table(["forward and backward, time(2T)/time(T)", "ratio", "target"], growth),
        markdown_table(["trainer", "share of the step", "target"], [[everything, f"{share['median']:.1%}", "5%"]]),
    ]
    return "\n\n".join(sections) + "\n"


def measure_cpu(output: Path, *, rounds: int, steps: int) -> None:
    """Measure everything and write speed.json and speed.md into `output`; `steps` training steps are timed."""
    results = {
        "environment": environment(),
        "against_token_loop": against_token_loop(rounds),
        "growth_with_length": growth_with_length(rounds),
        "trainer_overhead": trainer_overhead(steps),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "speed.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (output / "speed.md").write_text(table(results), encoding="utf-8")
    print(table(results))
