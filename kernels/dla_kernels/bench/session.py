"""One run of the benchmark: does the jobs in order within its time, and keeps kernels.json up to date."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dla_kernels.bench import inputs as inputs_module
from dla_kernels.bench.decode import measure_decode
from dla_kernels.bench.inputs import SPARSE_RATE, TAU, LayerInputs, Shape, boundary_rate, layer_inputs, tau_for_rate
from dla_kernels.bench.layers import Arm, Layer, MemoryLayer, build_layer, fla_state
from dla_kernels.bench.measure import (
    Case,
    Stopwatch,
    environment,
    is_lost,
    matrix_rate,
    measure_in_turn,
    outcome,
    run_at_once,
)
from dla_kernels.bench.parts import against_matrix_rate, measure_parts
from dla_kernels.bench.schedule import BATCH_1_FROM, Job, schedule
from dla_kernels.bench.targets import judge

RESULTS = "kernels.json"
PASSES = ("forward", "forward_backward")
"""Evaluation's forward pass; training's forward pass and the gradients of everything it is given."""
SEARCH_TOKENS = 2048
"""Tokens on which the sparse regime's tau is searched."""
DECODE_STEPS = 30
DECODE_BATCHES = (1, 8)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    device: torch.device
    output: Path
    tokens: int
    """B * T."""
    lengths: list[int]
    patterns: list[str]
    minutes: float
    rounds: int
    workers: int
    """Processes that compile beforehand."""
    backend: str | None
    toy: bool

    @property
    def shapes(self) -> dict[str, Shape]:
        """Measured shapes by name."""
        return inputs_module.TOY_SHAPES if self.toy else inputs_module.SHAPES

    @property
    def attention(self) -> Shape:
        """Shape of softmax attention."""
        return inputs_module.TOY_ATTENTION if self.toy else inputs_module.ATTENTION

    @property
    def dtype(self) -> torch.dtype:
        """Of q, k and v."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def contexts(self) -> list[int]:
        """Context lengths of decoding: 1K to 128K by factors of 4, and the ends."""
        return [8, 16, 64] if self.toy else [1024, 4096, 16384, 65536, 131072]

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            "tokens": self.tokens,
            "lengths": self.lengths,
            "arms": self.patterns,
            "minutes": self.minutes,
            "rounds": self.rounds,
            "backend": self.backend or "default",
            "toy": self.toy,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@dataclass
class Budget:
    """Time of a run."""

    minutes: float
    now: Callable[[], float] = time.monotonic
    began: float = field(init=False)
    spent: dict[tuple[str, str, int], float] = field(default_factory=dict)
    """Seconds of the last job of each kind."""

    def __post_init__(self) -> None:
        self.began = self.now()

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return self.now() - self.began

    def is_over(self) -> bool:
        """Whether the time is used up."""
        return self.elapsed >= 60 * self.minutes

    def fits(self, key: tuple[str, str, int]) -> bool:
        """Whether another job of this kind would end in time; one of a new kind fits while there is any."""
        return self.elapsed + 1.1 * self.spent.get(key, 0.0) < 60 * self.minutes


class Session:
    """The state of one run."""

    def __init__(self, options: Options) -> None:
        self.options, self.budget = options, Budget(options.minutes)
        self.stopwatch = Stopwatch(options.device)
        self.taus: dict[str, dict[str, dict[str, float]]] = {}
        self.results: dict[str, Any] = {
            "environment": environment(options.device) | {"fla": fla_state(options.device)},
            "options": options.as_dict(),
            "matrix_rate": None,
            "inputs": self.taus,
            "layers": [],
            "parts": [],
            "decode": [],
            "left_out": [],
        }
        self._earlier = self._read_earlier()

    def run(self) -> dict[str, Any]:
        """Everything; returns what kernels.json holds afterwards."""
        options = self.options
        if options.workers:
            self.results["compiling"] = compile_beforehand(options, self.budget)
        size = 256 if options.toy else 8192
        self.results["matrix_rate"] = matrix_rate(self.stopwatch, size=size)
        for job in schedule(list(options.shapes), options.lengths, options.patterns):
            if not self.budget.fits(job.cost_key):
                self.results["left_out"].append({"job": str(job), "reason": "the time was up"})
                continue
            began = self.budget.elapsed
            status, detail = outcome(functools.partial(self._do, job))
            self.budget.spent[job.cost_key] = self.budget.elapsed - began
            if status != "ok":
                self.results["left_out"].append({"job": str(job), "reason": f"{status}: {detail}"})
            self.stopwatch.release()
            self.save()
            print(f"{self.budget.elapsed:6.0f} s  {job}  {detail}", flush=True)
            if is_lost(options.device):
                self.results["left_out"].append({"job": "all further jobs", "reason": f"the device was lost in {job}"})
                break
        if options.device.type == "cuda":
            self.results["environment"]["clocks_afterwards"] = environment(options.device)["clocks"]
        return self.save()

    def save(self) -> dict[str, Any]:
        """Write kernels.json: these results over those of an earlier run into the same folder, and the targets."""
        whole = merged(self._earlier, self.results) if self._earlier else dict(self.results)
        whole["targets"] = judge(whole)
        write_json(self.options.output / RESULTS, whole)
        return whole

    def _read_earlier(self) -> dict[str, Any] | None:
        """Results of an earlier run with the same B * T, device and type."""
        path = self.options.output / RESULTS
        if not path.is_file():
            return None
        earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = all(earlier["options"][key] == self.results["options"][key] for key in ("tokens", "toy", "dtype"))
        same = same and earlier["environment"]["device"] == self.results["environment"]["device"]
        return earlier if same else None

    def _do(self, job: Job) -> None:
        {"layers": self._layers, "batch_1": self._batch_1, "parts": self._parts, "decode": self._decode}[job.kind](job)

    def _layers(self, job: Job) -> None:
        self._compare(job, [(job.length, max(1, self.options.tokens // job.length))], PASSES)

    def _batch_1(self, job: Job) -> None:
        lengths = [t for t in sorted(self.options.lengths) if t >= (0 if self.options.toy else BATCH_1_FROM)]
        self._compare(job, [(t, 1) for t in lengths if t <= self.options.tokens], PASSES[1:])

    def _compare(self, job: Job, sizes: list[tuple[int, int]], passes: tuple[str, ...]) -> None:
        """All arms of a job at (length, batch) sizes, in turn."""
        shape, tau = self.options.shapes[job.shape], self._regime(job.shape)[job.regime]["tau"]
        cases: list[Case] = []
        for length, batch in sizes:
            inputs = self._inputs(shape, batch, length)
            rate = boundary_rate(inputs, tau, self.options.backend)
            for arm in job.arms:
                record = {
                    "kind": job.kind,
                    "shape": job.shape,
                    "arm": arm.name,
                    "regime": job.regime,
                    "length": length,
                    "batch": batch,
                    "boundary_rate": rate if arm.family == "dla" else None,
                }
                cases += self._cases(arm, shape, inputs, tau, record, passes)
        self.results["layers"] += [case.record for case in cases]
        measure_in_turn(cases, self.options.rounds, self.stopwatch, after=self.save, hurry=self.budget.is_over)

    def _cases(
        self, arm: Arm, shape: Shape, inputs: LayerInputs, tau: float, record: dict[str, Any], passes: tuple[str, ...]
    ) -> list[Case]:
        """One case a pass; where the layer cannot be built, records that say so and nothing to measure."""
        built: list[Layer] = []
        status, detail = outcome(lambda: built.append(self._build(arm, shape, inputs, tau)))
        if not built:
            missing = arm.family.startswith("fla")
            reason = {"status": "absent" if missing else status, "detail": detail}
            self.results["layers"] += [record | {"pass": name} | reason for name in passes]
            return []
        size = sum(leaf.numel() * leaf.element_size() for leaf in built[0].leaves)
        return [Case(_pass(built[0], name), record | {"pass": name, "status": "started"}, size) for name in passes]

    def _build(self, arm: Arm, shape: Shape, inputs: LayerInputs, tau: float) -> Layer:
        options = self.options
        return build_layer(arm, shape, inputs, attention=options.attention, tau=tau, backend=options.backend)

    def _parts(self, job: Job) -> None:
        options, shape = self.options, self.options.shapes[job.shape]
        inputs = self._inputs(shape, max(1, options.tokens // job.length), job.length)
        for arm in job.arms:
            layer = self._build(arm, shape, inputs, self._regime(job.shape)[job.regime]["tau"])
            assert isinstance(layer, MemoryLayer)
            found = measure_parts(layer, options.rounds, self.stopwatch)
            tflops = self.results["matrix_rate"]["tflops"]["median"]
            found |= against_matrix_rate(layer, found, tflops)
            self.results["parts"].append({"shape": job.shape, "arm": arm.name, "length": job.length} | found)

    def _decode(self, job: Job) -> None:
        options = self.options
        records = measure_decode(
            options.shapes[job.shape],
            30,
            options.contexts,
            list(DECODE_BATCHES),
            3 if options.toy else DECODE_STEPS,
            self.stopwatch,
            dtype=options.dtype,
            backend=options.backend,
        )
        self.results["decode"] += [{"shape": job.shape} | record for record in records]

    def _inputs(self, shape: Shape, batch: int, length: int) -> LayerInputs:
        return layer_inputs(shape, batch, length, dtype=self.options.dtype, device=self.options.device)

    def _regime(self, name: str) -> dict[str, dict[str, float]]:
        """tau and boundary rate of each regime on a shape's inputs."""
        if name not in self.taus:
            options = self.options
            sample = self._inputs(options.shapes[name], 1, min(SEARCH_TOKENS, options.tokens))
            sparse = tau_for_rate(sample, SPARSE_RATE, options.backend)
            self.taus[name] = {
                regime: {"tau": tau, "boundary_rate": boundary_rate(sample, tau, options.backend)}
                for regime, tau in (("dense", TAU), ("sparse", sparse))
            }
        return self.taus[name]


def _pass(layer: Layer, name: str) -> Callable[[], object]:
    if name == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return layer.forward(training=False)

        return forward

    upstream: list[Tensor] = []

    def forward_backward() -> object:
        o = layer.forward(training=True)
        if not upstream:
            generator = torch.Generator(o.device).manual_seed(2)
            upstream.append(torch.randn(o.shape, generator=generator, device=o.device, dtype=o.dtype))
        return torch.autograd.grad(o, layer.leaves, upstream[0], allow_unused=True)

    return forward_backward


def merged(earlier: dict[str, Any], newer: dict[str, Any]) -> dict[str, Any]:
    """`newer` with the records of `earlier` that it did not measure itself."""
    keys = {
        "layers": ("kind", "shape", "arm", "regime", "length", "batch", "pass"),
        "parts": ("shape", "arm", "length"),
        "decode": ("shape", "batch", "context"),
    }
    whole = {**earlier, **newer, "inputs": {**earlier["inputs"], **newer["inputs"]}}
    for table, names in keys.items():
        taken = {tuple(record[name] for name in names) for record in newer[table]}
        kept = [record for record in earlier[table] if tuple(record[name] for name in names) not in taken]
        whole[table] = kept + newer[table]
    return whole


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write atomically: a run killed while writing leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


COMPILE_TOKENS = 256
COMPILE_SHARE = 0.4
"""Most of a run's time that compiling beforehand may take."""


def compile_one_of(options: Options, index: int, workers: int) -> None:
    """Run every `workers`-th group of measured layers once on few tokens, for what that leaves in Triton's cache.

    Layers of one group differ in their reads alone, and so share most kernels.
    """
    groups: dict[tuple[Any, ...], dict[str, tuple[Shape, Arm]]] = {}
    for job in schedule(list(options.shapes), options.lengths, options.patterns):
        for arm in job.arms:
            group = groups.setdefault((job.shape, arm.family, arm.capacity, arm.closed_slots), {})
            group[f"{job.shape}/{arm.name}"] = options.shapes[job.shape], arm
    for group in list(groups.values())[index::workers]:
        for name, (shape, arm) in group.items():
            inputs = layer_inputs(shape, 1, COMPILE_TOKENS, dtype=options.dtype, device=options.device)
            status, detail = outcome(functools.partial(_run_once, options, arm, shape, inputs))
            if status != "ok" and not arm.family.startswith("fla"):
                print(f"compiling {name}: {detail}", flush=True)


def _run_once(options: Options, arm: Arm, shape: Shape, inputs: LayerInputs) -> None:
    layer = build_layer(arm, shape, inputs, attention=options.attention, tau=TAU, backend=options.backend)
    for name in PASSES:
        _pass(layer, name)()


def compile_beforehand(options: Options, budget: Budget) -> dict[str, Any]:
    """Fill Triton's cache by `options.workers` processes at once, in at most COMPILE_SHARE of the time."""
    command = [sys.executable, "-m", "dla_kernels.bench", f"--device={options.device}", f"--tokens={options.tokens}"]
    command += [f"--lengths={','.join(map(str, options.lengths))}", f"--arms={','.join(options.patterns)}"]
    command += [f"--backend={options.backend}"] if options.backend else []
    command += ["--toy"] if options.toy else []
    commands = [[*command, f"--compile-part={index}/{options.workers}"] for index in range(options.workers)]
    done = run_at_once(commands, COMPILE_SHARE * 60 * options.minutes)
    return done | {"seconds": budget.elapsed}
