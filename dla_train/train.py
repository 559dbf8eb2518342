"""Training a language model: build the parts, loop over optimizer steps, stop.

`train(config)` is the program; `main` is its Hydra command line (`dla-train experiment=...`). Whatever decides the
course of a run (stop, validate, save, a loss that is not finite) is a function of the step or of numbers that are
already equal on every rank, so all ranks take the same turn at the same step.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dla_train.checkpoint import (
    Checkpointer,
    CheckpointError,
    RunDirectoryError,
    check_run_directory,
    run_identity,
    write_run_files,
)
from dla_train.config import Config, ConfigError
from dla_train.config_rules import validate
from dla_train.data.errors import DataError
from dla_train.data.loader import Batch, DataSources, open_sources
from dla_train.data.packing import IGNORED_TARGET
from dla_train.engine import Engine, build_engine
from dla_train.evaluate.held_out import HeldOut, held_out_loss
from dla_train.evaluate.loading import build_model
from dla_train.hydra_app import config_to_yaml, run_application
from dla_train.metrics import PhaseClock, SpeedMeter, open_sinks
from dla_train.optim import gate_temperature, learning_rate
from dla_train.parallel.mesh import Mesh
from dla_train.telemetry import MemoryTelemetry

logger = logging.getLogger("dla_train.train")  # not __name__, which `python -m` makes "__main__"


class TrainingDiverged(ArithmeticError):
    """The gradient of a step is not finite; the parameters were not saved after it."""


@dataclass(frozen=True)
class TrainResult:
    """How a run, or this part of it, ended."""

    step: int
    """Optimizer steps done, over all starts."""
    loss: float | None
    """Training loss of the last step in nats per token; None if no step was left to do."""
    validation: HeldOut | None
    """The last validation of this start."""


def main() -> None:
    """The command `dla-train`: exits with 2 and one paragraph after a mistake in the configuration or the data."""
    configure_logging()
    errors = (ConfigError, DataError, CheckpointError, RunDirectoryError, TrainingDiverged)
    sys.exit(run_application(train, errors))


def configure_logging() -> None:
    """Messages of this package on standard error, as plain lines; only rank 0 says more than errors."""
    package = logging.getLogger("dla_train")
    package.addHandler(logging.StreamHandler())
    package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def train(config: Config) -> TrainResult:
    """Train, or go on training, the run that `config` describes. Raises typed errors before anything is overwritten."""
    with Mesh.start(config) as mesh:
        validate(config, mesh.size)
        torch.manual_seed(config.seed + mesh.rank)
        sources = open_sources(
            config.data,
            global_batch_rows=config.train.global_batch_rows,
            seed=config.seed,
            vocab_size=config.model.vocab_size,
            pin_memory=mesh.device.type == "cuda",
        )
        identity = run_identity(config, sources.train.fingerprint, sources.tokenizer.fingerprint)
        check_run_directory(config, identity, mesh)
        model = build_model(config, mesh.device, mesh.axes)
        engine = build_engine(config, model, mesh)
        checkpointer = Checkpointer(config, mesh)
        resumed = checkpointer.resume(engine)
        done = sources.train.resume_step(resumed.data) if resumed else 0
        write_run_files(config, config_to_yaml(config), identity, mesh)
        parameters = sum(math.prod(shape) for name, shape in engine.shapes().items() if name.startswith("model/"))
        logger.info("%s", _headline(config, mesh, parameters, done))
        with RunLog(config, mesh, MemoryTelemetry(model, mesh), done) as log:
            return Loop(config, mesh, sources, engine, checkpointer, log).run(done)


class Loop:
    """The optimizer steps of one start."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        sources: DataSources,
        engine: Engine,
        checkpointer: Checkpointer,
        log: RunLog,
    ) -> None:
        self.config, self.mesh, self.sources = config, mesh, sources
        self.engine, self.checkpointer, self.log = engine, checkpointer, log
        self.last = config.train.stop_at_step or config.train.steps

    def run(self, done: int) -> TrainResult:
        """Train until the last step; `done` steps were done before this start."""
        loss, validation = None, None
        self.log.clock.restart()
        while done < self.last:
            sums, targets, numbers = self._train_step(done)
            done += 1
            if self.log.due(done, self.last):
                nats, partition = (self.mesh.sum(sums, self.mesh.axes.batch) / targets).tolist()
                loss = nats
                numbers |= self.sources.train.numbers(done)
                numbers |= {"loss": nats} | ({"z_loss": partition} if self.config.optim.z_loss else {})
                self.log.training(done, numbers)
            if self._validation_due(done):
                validation = self._validate()
                self.log.validation(done, validation)
                self.log.clock.restart()
            if self.checkpointer.due(done, done == self.last):
                self.checkpointer.save(done, self.engine, self.sources.train.state(done))
                self.log.clock.restart()
        self.sources.train.close()
        return TrainResult(step=done, loss=loss, validation=validation)

    def _train_step(self, done: int) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Step `done` + 1 -> this rank's (summed nats, z-loss) [2], the targets of all ranks, numbers to log."""
        config, clock, step = self.config, self.log.clock, done + 1
        lr = learning_rate(config.optim, config.train.steps, step)
        temperature = gate_temperature(config.memory, config.train.steps, step)
        clock.synchronize = self.log.due(step, self.last)
        with clock.phase("data"):
            batches = self.sources.train.batch(
                done, self.mesh.data_rank, self.mesh.data_size, config.train.micro_batch_rows
            )
        targets = self._target_count(batches)
        sums = torch.zeros(2, device=self.mesh.device)
        for index, batch in enumerate(batches):
            with clock.phase("forward"):
                nats, partition = self._losses(batch, temperature)
            with clock.phase("backward"):
                self.engine.backward((nats + partition) / targets, last=index == len(batches) - 1)
            sums += torch.stack([nats.detach(), partition.detach()])
        with clock.phase("step"):
            grad_norm = self.engine.step(lr).grad_norm
        if not math.isfinite(grad_norm):  # the norm over all ranks' gradients: the same number everywhere
            raise TrainingDiverged(
                f"step {step}: the gradient norm is {grad_norm}; lower optim.lr={config.optim.lr} or set "
                f"optim.clip_norm in a new run_dir, or go on from the last checkpoint in {config.run_dir}"
            )
        self.log.end_step(self.sources.train.tokens_per_step)
        return sums, targets, {"lr": lr, "grad_norm": grad_norm}

    def _losses(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        device = self.mesh.device
        tokens, cu_seqlens = (part.to(device, non_blocking=True) for part in (batch.tokens, batch.cu_seqlens))
        output = self.engine.module(tokens, cu_seqlens, gate_temperature=temperature)
        loss = self.engine.module.token_loss
        nats, partition, _ = loss(output.logits, batch.targets.to(device, non_blocking=True), self.config.optim.z_loss)
        return nats, partition

    def _target_count(self, batches: list[Batch]) -> Tensor:
        """Targets of the global batch: the loss is their mean, however they are spread over ranks and micro-batches."""
        here = torch.stack([(batch.targets != IGNORED_TARGET).sum() for batch in batches]).sum()
        return self.mesh.sum(here, self.mesh.axes.data).clamp_min(1)

    def _validation_due(self, step: int) -> bool:
        train = self.config.train
        interval = train.validation_interval_steps
        return train.validation_batches > 0 and (step == train.steps or (interval > 0 and step % interval == 0))

    def _validate(self) -> HeldOut:
        assert self.sources.validation is not None  # config rule
        train, mesh = self.config.train, self.mesh
        batches = self.sources.validation.validation_batches(
            train.validation_batches, mesh.data_rank, mesh.data_size, train.micro_batch_rows
        )
        module, axes = self.engine.module, mesh.axes
        module.eval()
        result = held_out_loss(
            module,
            batches,
            self.sources.tokenizer,
            mesh.device,
            lambda totals: mesh.sum(totals, axes.batch),
            loss=module.token_loss,
            ranks_per_row=axes.context.size,
        )
        self.engine.module.train()
        return result


class RunLog:
    """Clock, progress bar and sinks of one start; collective numbers on all ranks, output on rank 0."""

    def __init__(self, config: Config, mesh: Mesh, memory: MemoryTelemetry, done: int) -> None:
        self._config, self._mesh, self._memory = config, mesh, memory
        self.clock = PhaseClock(mesh.device)
        self._speed = SpeedMeter(config, mesh)
        self._sinks = open_sinks(config, done) if mesh.is_writer else []
        last = config.train.stop_at_step or config.train.steps
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
        for sink in self._sinks:
            sink.close()

    def due(self, step: int, last: int) -> bool:
        """Whether `step` gets a line: the first, every interval_steps-th, and the last of this start."""
        return step == 1 or step == last or step % self._config.logging.interval_steps == 0

    def end_step(self, tokens: int) -> None:
        """Stop the clock after a step over `tokens` tokens (all ranks), take the memory's counts, move the bar."""
        self._memory.after_step()
        self._speed.add(tokens, self.clock.end_step())
        self._bar.update()

    def training(self, step: int, numbers: dict[str, Any]) -> None:
        """Write the line of a training step. Collective."""
        numbers = numbers | self._speed.read() | self._memory.read()
        shown = {"loss": f"{numbers['loss']:.4f}", "tokens/s": f"{numbers['tokens_per_second']:,.0f}"}
        self._bar.set_postfix(shown)
        self._write(step, numbers)

    def validation(self, step: int, result: HeldOut) -> None:
        """Write the line of a validation and forget what it counted in the memories."""
        self._memory.drop()
        numbers = {"validation_loss": result.loss, "validation_bits_per_byte": result.bits_per_byte}
        logger.info("step %d: held-out loss %.4f, %.4f bits per byte", step, result.loss, result.bits_per_byte)
        self._write(step, numbers)

    def _write(self, step: int, numbers: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(step, numbers)


def _headline(config: Config, mesh: Mesh, parameters: int, done: int) -> str:
    start = f"continues after step {done}" if done else "starts"
    return (
        f"{config.name} {start}: {parameters / 1e6:.1f}M parameters, {config.model.backbone} x {config.memory.policy}, "
        f"engine {config.engine.name}, {mesh.size} rank(s) on {mesh.device.type}, {config.train.steps} steps, "
        f"{Path(config.run_dir)}"
    )


if __name__ == "__main__":
    main()
