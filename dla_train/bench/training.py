"""Training steps of the paper's models on one GPU: tokens a second, MFU, memory, and what the time goes into.

The real model, loss, gradients, clipping and optimizer on random tokens, micro-batches of the experiment's rows, one
per step. Arms run one after another, each alone in memory: two models of 1.3B with their moments, side by side, would
leave too little for the activations that an arm without recomputation keeps. Writes training.json after every record.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from dla_kernels.bench.measure import Run, Stopwatch, environment, kernel_times, outcome, run_at_once, summary
from dla_kernels.bench.session import COMPILE_SHARE, COMPILE_TOKENS, Budget, write_json
from dla_train.config import Config
from dla_train.engine import LocalEngine
from dla_train.hydra_app import compose
from dla_train.metrics import model_flops_utilisation, peak_tflops
from dla_train.models.build import meta_model
from dla_train.models.cost import flops_per_token, parameter_count
from dla_train.models.loss import next_token_loss
from dla_train.parallel.mesh import Mesh

RESULTS = "training.json"
ARMS = (
    ("mamba2_780m", "dla"),
    ("mamba2_780m", "single"),
    ("transformer_778m", "none"),
    ("gated_deltanet_1300m", "dla"),
    ("gated_deltanet_1300m", "single"),
    ("mamba2_780m", "log_linear"),
    ("gated_deltanet_1300m", "log_linear"),
)
"""(model, memory) in the order in which targets need them."""
TOY_MODELS = {
    "mamba2_780m": "mamba2_tiny",
    "gated_deltanet_1300m": "gated_deltanet_tiny",
    "transformer_778m": "transformer_tiny",
}
CONTEXTS = (16384, 32768)
TOY_CONTEXTS = (48,)
TOP = 5
"""Kernels named in a profile."""
SINGLE_SHARE = 0.5
"""Least share of its single-state arm's tokens a second that dynamic memory should reach."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    device: torch.device
    output: Path
    contexts: list[int]
    patterns: list[str]
    rows: int
    """Rows of a step; 0 takes the experiment's micro-batch."""
    steps: int
    minutes: float
    toy: bool

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            "contexts": self.contexts,
            "arms": self.patterns,
            "steps": self.steps,
            "minutes": self.minutes,
            "toy": self.toy,
        }


def configuration(model: str, memory: str, *, toy: bool, overrides: tuple[str, ...] = ()) -> Config:
    """The paper's experiment of a model and memory, on the plain engine; `toy`: its smallest relative, in float32."""
    name = f"paper_{model}" if memory == "none" else f"paper_{model}_{memory}"
    small = [f"model={TOY_MODELS[model]}", "train.dtype=float32"] if toy else []
    return compose([f"experiment={name}", "engine=local", *small, *overrides])


class Trainer:
    """One model with its optimizer, and a step on random tokens."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = meta_model(config).train()
        self.engine = LocalEngine(config, self.model, Mesh(rank=0, size=1, device=device, owns_group=False))
        self._generator = torch.Generator(device).manual_seed(0)

    def phases(self, context: int, rows: int) -> dict[str, Run]:
        """forward, backward and step of one optimizer step, to be called in this order."""
        config, loss = self.config, []
        size = (rows, context + 1)
        tokens = torch.randint(config.model.vocab_size, size, generator=self._generator, device=self.device)

        def forward() -> None:
            output = self.engine.module(tokens[:, :-1].contiguous(), gate_temperature=config.memory.gate_temperature)
            nats, partition, count = next_token_loss(output.logits, tokens[:, 1:], config.optim.z_loss)
            loss.append((nats + partition) / count)

        def backward() -> None:
            self.engine.backward(loss.pop(), last=True)

        def step() -> None:
            self.engine.step(config.optim.lr)

        return {"forward": forward, "backward": backward, "step": step}

    def train(self, context: int, rows: int) -> None:
        """One optimizer step."""
        for phase in self.phases(context, rows).values():
            phase()

    def forget(self) -> None:
        """Drop the gradients of a step that failed on the way."""
        self.model.zero_grad(set_to_none=True)


def measure_steps(
    trainer: Trainer, context: int, rows: int, recompute: bool, steps: int, stopwatch: Stopwatch
) -> dict[str, Any]:
    """Numbers of `steps` optimizer steps after two to warm up (one in a toy run of a single step)."""
    config, model, device = trainer.config, trainer.model, stopwatch.device
    model.recompute = recompute
    for _ in range(min(2, steps)):
        trainer.train(context, rows)
    model.reset_memory_statistics()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    laps: dict[str, list[float]] = {}
    for _ in range(steps):
        phases = trainer.phases(context, rows)
        for phase, milliseconds in zip(phases, stopwatch.laps(list(phases.values())), strict=True):
            laps.setdefault(phase, []).append(milliseconds)
    whole = [sum(step) for step in zip(*laps.values(), strict=True)]
    flops = flops_per_token(config.model, config.memory, context).training
    speed = summary([1e3 * rows * context / milliseconds for milliseconds in whole])
    peak = peak_tflops(0.0, device)
    boundaries, tokens, live = model.memory_statistics().sum((0, 1)).tolist()
    return {
        "milliseconds": summary(whole),
        "phases": {phase: summary(rounds)["median"] for phase, rounds in laps.items()},
        "tokens_per_second": speed,
        "flops_per_token": flops,
        "mfu": model_flops_utilisation(speed["median"], flops, peak, 1) if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "boundary_rate": boundaries / tokens if tokens else None,
        "live_slots": live / tokens if tokens else None,
    }


def costliest(trainer: Trainer, context: int, rows: int, device: torch.device) -> list[dict[str, Any]]:
    """The kernels that take most of one step, with their share of the device's busy time."""
    kernels = kernel_times(device, lambda: trainer.train(context, rows))
    busy = sum(kernel["milliseconds"] for kernel in kernels)
    return [kernel | {"share": kernel["milliseconds"] / busy} for kernel in kernels[:TOP]]


class TrainingBenchmark:
    """One run: the arms in order, within the time."""

    def __init__(self, options: Options) -> None:
        self.options, self.budget = options, Budget(options.minutes)
        self.stopwatch = Stopwatch(options.device)
        self.results: dict[str, Any] = {
            "environment": environment(options.device),
            "options": options.as_dict(),
            "steps": [],
            "profiles": [],
            "left_out": [],
        }

    def run(self) -> dict[str, Any]:
        """Everything; returns the results."""
        if self.options.device.type == "cuda":
            self.results["compiling"] = self._compile_beforehand() | {"seconds": self.budget.elapsed}
        for model, memory in self._arms():
            name = f"{model}/{memory}"
            key = ("training", model, 0)
            if not self.budget.fits(key):
                self.results["left_out"].append({"job": name, "reason": "the time was up"})
                continue
            began = self.budget.elapsed
            status, detail = outcome(functools.partial(self._arm, model, memory))
            self.budget.spent[key] = self.budget.elapsed - began
            if status != "ok":
                self.results["left_out"].append({"job": name, "reason": f"{status}: {detail}"})
            self.stopwatch.release()
            self._save()
            print(f"{self.budget.elapsed:6.0f} s  {name}  {detail}", flush=True)
        return self._save()

    def _arms(self) -> list[tuple[str, str]]:
        patterns = self.options.patterns or ["*"]
        return [arm for arm in ARMS if any(fnmatch("/".join(arm), pattern) for pattern in patterns)]

    def _compile_beforehand(self) -> dict[str, int]:
        """A process an arm fills Triton's cache: one after another they would compile for minutes."""
        command = [sys.executable, "-m", "dla_train.bench", "training", f"--device={self.options.device}"]
        command += ["--toy"] if self.options.toy else []
        commands = [[*command, f"--compile={model}/{memory}"] for model, memory in self._arms()]
        return run_at_once(commands, COMPILE_SHARE * 60 * self.options.minutes)

    def _arm(self, model: str, memory: str) -> None:
        options = self.options
        config = configuration(model, memory, toy=options.toy)
        trainer = Trainer(config, options.device)
        rows = options.rows or config.train.micro_batch_rows
        profiled = False
        for context, recompute in self._settings():
            if self.budget.is_over():
                self.results["left_out"].append({"job": f"{model}/{memory}, T {context}", "reason": "the time was up"})
                return
            record = {"model": model, "memory": memory, "context": context, "rows": rows, "recompute": recompute}
            record |= {"parameters": parameter_count(config.model, config.memory), "capacity": config.memory.capacity}
            found: dict[str, Any] = {}

            def measure(context: int = context, recompute: bool = recompute, found: dict[str, Any] = found) -> None:
                found |= measure_steps(trainer, context, rows, recompute, options.steps, self.stopwatch)

            status, detail = outcome(measure)
            if status != "ok":
                found = {"detail": detail}
                trainer.forget()
                self.stopwatch.release()
            self.results["steps"].append(record | {"status": status} | found)
            self._save()
            if status == "ok" and not profiled:
                profiled = True
                top = costliest(trainer, context, rows, options.device)
                self.results["profiles"].append({"model": model, "memory": memory, "context": context, "top": top})

    def _settings(self) -> Iterator[tuple[int, bool]]:
        """(context, recompute), the experiments' own first."""
        for context in self.options.contexts:
            yield context, True
            yield context, False

    def _save(self) -> dict[str, Any]:
        whole = self.results | {"targets": judge(self.results)}
        write_json(self.options.output / RESULTS, whole)
        return whole


def compile_arm(model: str, memory: str, *, toy: bool, device: torch.device) -> None:
    """One step of one layer on few tokens, for what it leaves in Triton's cache."""
    config = configuration(model, memory, toy=toy, overrides=("model.num_layers=1",))
    Trainer(config, device).train(COMPILE_TOKENS, 1)


def judge(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Whether training with dynamic memory is as fast as it was meant to be: claim, met (null: not measured), numbers.

    With recomputation, as the experiments train. The Transformer is compared with the model of its own size.
    """
    against_single: dict[str, float | None] = {}
    against_transformer: dict[str, float | None] = {}
    for model in ("mamba2_780m", "gated_deltanet_1300m"):
        ours, single = (_speed(results, model, memory, CONTEXTS[0]) for memory in ("dla", "single"))
        against_single[model] = _ratio(ours, single)
    for context in sorted({CONTEXTS[0], *results["options"]["contexts"]}):
        if context >= CONTEXTS[0]:
            ours = _speed(results, "mamba2_780m", "dla", context)
            against_transformer[str(context)] = _ratio(ours, _speed(results, "transformer_778m", "none", context))
    return {
        "single": {
            "claim": f"tokens a second of DLA, K = 30, at least {SINGLE_SHARE} of the single state's at 16K",
            "met": _all(against_single, lambda ratio: ratio >= SINGLE_SHARE),
            "numbers": against_single,
        },
        "transformer": {
            "claim": "tokens a second of Mamba-2 780M with DLA above the Transformer 778M's from 16K on",
            "met": _all(against_transformer, lambda ratio: ratio > 1),
            "numbers": against_transformer,
        },
    }


def _speed(results: dict[str, Any], model: str, memory: str, context: int) -> float | None:
    wanted = {"model": model, "memory": memory, "context": context, "recompute": True, "status": "ok"}
    for record in results["steps"]:
        if all(record[key] == value for key, value in wanted.items()):
            speed: float = record["tokens_per_second"]["median"]
            return speed
    return None


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _all(ratios: dict[str, float | None], holds: Any) -> bool | None:
    found = [None if ratio is None else holds(ratio) for ratio in ratios.values()]
    return False if False in found else None if None in found else True


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results; exit code 2 where there is no such device."""
    parser = argparse.ArgumentParser(
        prog="python -m dla_train.bench training", description="Training steps on one GPU."
    )
    parser.add_argument("--device", default="cuda", help="cuda, cpu (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder (default %(default)s)")
    parser.add_argument("--contexts", help="context lengths, comma separated (default 16384,32768)")
    parser.add_argument("--arms", default="", help="patterns of model/memory, e.g. '*/dla,transformer*'")
    parser.add_argument("--rows", type=int, default=0, help="rows of a step (default: the experiment's micro-batch)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing beyond (default %(default)s)")
    parser.add_argument("--toy", action="store_true", help="the smallest models in float32, to try the program itself")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: training steps are measured on CUDA; --toy --device cpu tries the program", file=sys.stderr)
        return 2
    if given.compile:
        model, memory = given.compile.split("/")
        compile_arm(model, memory, toy=given.toy, device=device)
        return 0
    contexts = [int(t) for t in given.contexts.split(",")] if given.contexts else []
    options = Options(
        device=device,
        output=given.output,
        contexts=contexts or list(TOY_CONTEXTS if given.toy else CONTEXTS),
        patterns=[pattern for pattern in given.arms.split(",") if pattern],
        rows=given.rows,
        steps=given.steps,
        minutes=given.minutes,
        toy=given.toy,
    )
    results = TrainingBenchmark(options).run()
    print(json.dumps(results["targets"], indent=1))
    print(f"written to {options.output / RESULTS}")
    return 0
