"""Clock, progress bar and sinks of one start of a run: its numbers on the way to files and screen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dla_train.config import Config
from dla_train.evaluate.held_out import HeldOut
from dla_train.metrics import PhaseClock, SpeedMeter
from dla_train.parallel.mesh import Mesh
from dla_train.start_clock import StartClock
from dla_train.telemetry import MemoryLook, MemoryTelemetry
from dla_train.trackers import METRICS_FILE, JsonLines, open_sinks, read_lines

logger = logging.getLogger("dla_train.train")

EVALUATION = "eval"
"""First part of the names of published tasks' metrics, `eval/<task>/<metric>`."""
TaskMetrics = Mapping[str, tuple[float, float | None]]
"""(value, its standard error if there is one) by metric."""
HEADS_FILE = "memory.jsonl"
"""In the run directory: what a look found in every head."""


class RunLog:
    """Clock, progress bar and sinks of one start; collective numbers on all ranks, output on rank 0."""

    def __init__(self, config: Config, mesh: Mesh, memory: MemoryTelemetry, done: int, start: StartClock) -> None:
        self._config, self._mesh, self._memory, self._start = config, mesh, memory, start
        self.clock = PhaseClock(mesh.device)
        self._speed = SpeedMeter(config, mesh)
        self._sinks = open_sinks(config, done) if mesh.is_writer else []
        looks = mesh.is_writer and self._looks()
        self._heads = JsonLines(Path(config.run_dir) / HEADS_FILE, done) if looks else None
        last = config.train.last_step
        hidden = not (config.logging.progress and mesh.is_writer)
        self._bar = tqdm(total=last, initial=done, unit="step", desc=config.name, disable=hidden, dynamic_ncols=True)
        self._redirect = logging_redirect_tqdm(loggers=[logging.getLogger("dla_train")])

    def __enter__(self) -> RunLog:
        self._redirect.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._redirect.__exit__(kind, error, trace)
        for sink in [*self._sinks, *([self._heads] if self._heads else [])]:
            sink.close()

    def due(self, step: int) -> bool:
        """Whether `step` gets a line: the first, every interval_steps-th, and the last of this start."""
        return step in (1, self._config.train.last_step) or step % self._config.logging.interval_steps == 0

    def end_step(self, tokens: int) -> None:
        """Stop the clock after a step over `tokens` tokens (all ranks), take the memory's counts, move the bar."""
        with self.clock.phase("exchange"):
            self._memory.after_step()
        self._speed.add(tokens, self.clock.end_step())
        self._bar.update()
        self._start.part("first step")
        if said := self._start.report():
            logger.info("%s", said)

    def training(self, step: int, numbers: dict[str, Any]) -> None:
        """Write the line of a training step. Collective."""
        with self.clock.phase("exchange"):
            numbers = numbers | self._speed.read() | self._memory.read()
        shown = {"loss": f"{numbers['loss']:.4f}", "tokens/s": f"{numbers['tokens_per_second']:,.0f}"}
        self._bar.set_postfix(shown)
        self._write(step, numbers)

    def look_due(self, step: int) -> bool:
        """Whether the memories are looked into at `step`."""
        return self._looks() and step % self._config.logging.memory_interval_steps == 0

    def memory(self, step: int, look: MemoryLook) -> None:
        """Write the line of a look: every head's to memory.jsonl, means and histograms to the sinks. Collective."""
        with self.clock.phase("exchange"):
            found = look.read()
        self._write(step, found.numbers)
        for sink in self._sinks:
            sink.write_histograms(step, found.histograms)
        if self._heads is not None:
            self._heads.write(step, found.heads)

    def _looks(self) -> bool:
        return self._config.memory.policy != "none" and self._config.logging.memory_interval_steps > 0

    def drop_counts(self) -> None:
        """Forget what forward passes outside training counted in the memories."""
        self._memory.drop()

    def validation(self, step: int, result: HeldOut) -> None:
        """Write the line of a validation and forget what it counted in the memories."""
        self.drop_counts()
        gap = "" if result.gate_gap is None else f", hard boundaries cost {result.gate_gap:+.4f} over soft ones"
        line = "step %d: held-out loss %.4f, %.4f bits per byte%s"
        logger.info(line, step, result.loss, result.bits_per_byte, gap)
        self._write(step, result.numbers())

    def evaluation(self, step: int, task: str, metrics: TaskMetrics) -> None:
        """Write the metrics of a published task."""
        told: list[str] = []
        numbers: dict[str, float] = {}
        for metric, (value, stderr) in metrics.items():
            name = f"{EVALUATION}/{task}/{metric}"
            told.append(f"{metric} {value:.4f}" + ("" if stderr is None else f" +- {stderr:.4f}"))
            numbers |= {name: value} if stderr is None else {name: value, f"{name}_stderr": stderr}
        logger.info("step %d: %s %s", step, task, ", ".join(told))
        self._write(step, numbers)

    def evaluated(self, step: int) -> set[str]:
        """The tasks whose metrics of `step` are written, by an earlier start too. Collective."""
        return set(self._mesh.on_writer(lambda: _tasks_of(self._config, step)))

    def _write(self, step: int, numbers: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(step, numbers)


def _tasks_of(config: Config, step: int) -> set[str]:
    lines = read_lines(Path(config.run_dir) / METRICS_FILE)
    names = [name for line in lines if line["step"] == step for name in line]
    return {name.split("/")[1] for name in names if name.startswith(f"{EVALUATION}/")}
