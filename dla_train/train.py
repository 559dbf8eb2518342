"""Training a language model: build the parts, run the loop, go back to a checkpoint where the loop says so.

`train(config)` is the program; `main` is its Hydra command line (`dla-train experiment=...`). How a process ended is
told by its exit code and `status.json` in run_dir (resilience/exit_codes.py).
"""

from __future__ import annotations

import logging
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from dla_train.checkpoint.checkpointer import Checkpointer
from dla_train.checkpoint.errors import CheckpointError, RunDirectoryError
from dla_train.checkpoint.run_directory import hold_run_directory, run_identity, write_run_files
from dla_train.checkpoint.run_lock import RunLock
from dla_train.config import Config, ConfigError, ResilienceConfig
from dla_train.config_rules import validate
from dla_train.data.errors import DataError
from dla_train.data.loader import DataSources, open_sources
from dla_train.engine import Engine, build_engine
from dla_train.evaluate.held_out import HeldOut
from dla_train.harness.errors import EvaluateError
from dla_train.harness.planned import evaluation_of
from dla_train.huggingface.initial import begin_with
from dla_train.hydra_app import config_to_yaml, run_application
from dla_train.loop import Evaluation, Loop, LoopResult
from dla_train.models.build import meta_model
from dla_train.models.cost import merge_cache_bytes
from dla_train.models.language_model import LanguageModel
from dla_train.multirun import fixed_keys, run_point
from dla_train.parallel.mesh import Mesh
from dla_train.resilience.exit_codes import DIVERGED, FINISHED, STATUS_FILE, STOPPED, read_status, write_status
from dla_train.resilience.guard import Guard, Judgement
from dla_train.resilience.journal import JournalError, Rewind, append_to_journal, data_position, data_step, read_journal
from dla_train.resilience.stopping import StopSignals
from dla_train.resilience.watchdog import Watchdog
from dla_train.run_log import RunLog
from dla_train.start_clock import StartClock
from dla_train.telemetry import MemoryTelemetry

logger = logging.getLogger("dla_train.train")  # not __name__, which `python -m` makes "__main__"


class TrainingDiverged(ArithmeticError):
    """Numbers went wrong more often than `resilience` puts up with; the checkpoints are from before."""

    exit_code = DIVERGED


@dataclass(frozen=True)
class TrainResult:
    """How a run, or this part of it, ended."""

    step: int
    """Optimizer steps done, over all starts."""
    loss: float | None
    """Training loss of the last step in nats per token; None if no step was left to do."""
    validation: HeldOut | None
    """The last validation of this start."""
    stopped_by: str = ""
    """The signal that ended it early, by name; everything is saved."""


def main() -> None:
    """The command `dla-train`: its exit codes are in resilience/exit_codes.py; a mistake is told in one paragraph."""
    clock = StartClock.of_process()
    configure_logging()
    codes = [FINISHED]

    def job(config: Config) -> None:
        clock.part("settings")
        codes.append(STOPPED if train(config, clock).stopped_by else FINISHED)

    errors = (ConfigError, DataError, CheckpointError, RunDirectoryError, JournalError, EvaluateError, TrainingDiverged)
    sys.exit(run_application(job, errors, partial(run_point, fixed=fixed_keys(sys.argv[1:]))) or max(codes))


def configure_logging() -> None:
    """Messages of this package on standard error, as plain lines; only rank 0 says more than errors."""
    package = logging.getLogger("dla_train")
    package.addHandler(logging.StreamHandler())
    package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def train(config: Config, clock: StartClock | None = None) -> TrainResult:
    """Train, or go on training, the run that `config` describes. Raises typed errors before anything is overwritten.

    clock: what the start took so far; None begins here.
    """
    clock = clock or StartClock()
    limits, stacks = _limits(config.resilience), Path(config.run_dir) / "hangs"
    with Mesh.start(config) as mesh, Watchdog(limits, stacks, mesh.rank) as watchdog:
        watchdog.enter("setup")
        clock.part("ranks")
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
        clock.part("data")
        evaluation = evaluation_of(config, mesh, sources.tokenizer)
        if evaluation is not None:
            clock.part("tasks")
        with hold_run_directory(config, identity, mesh) as lock:
            return Run(config, mesh, sources, watchdog, identity, lock, clock, evaluation).train()


@dataclass(frozen=True)
class Run:
    """A run in a run directory that is this process's."""

    config: Config
    mesh: Mesh
    sources: DataSources
    watchdog: Watchdog
    identity: dict[str, Any]
    """What makes it this run."""
    lock: RunLock | None
    clock: StartClock
    evaluation: Evaluation | None

    def train(self) -> TrainResult:
        """Loops from checkpoint to checkpoint until one ends the run."""
        config, mesh = self.config, self.mesh
        model = meta_model(config, mesh.axes)
        engine = build_engine(config, model, mesh)
        self.clock.part("model")
        # until here a signal ends the process at once: there is nothing to save
        with StopSignals() as signals, Checkpointer(config, mesh, self.lock) as checkpointer:
            while True:
                ended = self._loop(model, engine, checkpointer, signals)
                if ended.judgement is None:
                    break
                self._go_back(ended, ended.judgement, checkpointer)
        engine.close()
        self.sources.train.close()
        state = "stopped" if ended.stopped_by else "finished"
        self._say(state, ended.step, STOPPED if ended.stopped_by else FINISHED, ended.stopped_by)
        logger.info("%s", _ending(config, ended))
        return TrainResult(ended.step, ended.loss, ended.validation, ended.stopped_by)

    def _loop(
        self, model: LanguageModel, engine: Engine, checkpointer: Checkpointer, signals: StopSignals
    ) -> LoopResult:
        """From the newest checkpoint, or the beginning, to the end or a judgement."""
        config, mesh = self.config, self.mesh
        self.watchdog.enter("setup")
        rewinds = self._rewinds()
        resumed = checkpointer.resume(engine)
        if resumed is None:
            self._check_nothing_was_saved(checkpointer.root)
            if config.train.initial is not None:
                begin_with(engine, config)
        done = resumed.step if resumed else 0
        position = data_position(done, rewinds)
        if resumed and (read := self.sources.train.resume_step(resumed.data)) != position:
            raise CheckpointError(
                f"the checkpoint of step {done} has read its data up to step {read}, but by "
                f"{config.run_dir}/journal.jsonl it is {position}; put that file back as it was"
            )
        write_run_files(config, config_to_yaml(config), self.identity, mesh)
        self._say("running", done, None)
        parameters = sum(math.prod(shape) for name, shape in engine.shapes().items() if name.startswith("model/"))
        logger.info("%s", _headline(config, mesh, parameters, done))
        self.clock.part("checkpoint")
        with RunLog(config, mesh, MemoryTelemetry(model, mesh), done, self.clock) as log:
            guard = Guard(config.resilience, resumed.losses if resumed else ())
            loop = Loop(
                config,
                mesh,
                self.sources,
                engine,
                checkpointer,
                log,
                signals,
                self.watchdog,
                tuple(rewinds),
                guard,
                self.evaluation,
            )
            return loop.run(done)

    def _check_nothing_was_saved(self, root: Path) -> None:
        """Raise CheckpointError, on every rank, where the run had checkpoints: starting anew would end its metrics."""
        status = self.mesh.from_writer(read_status(Path(self.config.run_dir)) if self.mesh.is_writer else None)
        if status and status["state"] != "diverged" and status["step"]:
            raise CheckpointError(
                f"{self.config.run_dir}/{STATUS_FILE} says {status['state']}, with step {status['step']} saved, but "
                f"{root} holds no checkpoint; put one back from a copy, or choose another run_dir to start anew"
            )

    def _go_back(self, ended: LoopResult, judgement: Judgement, checkpointer: Checkpointer) -> None:
        """Set the checkpoints of the bad steps aside and write down which data is passed over from now on."""
        self.watchdog.enter("setup")
        config, rewinds = self.config, self._rewinds()
        if len(rewinds) >= config.resilience.max_rewinds:
            self._give_up(
                ended.step, judgement, f"resilience.max_rewinds={config.resilience.max_rewinds} returns are used up"
            )
        step = checkpointer.go_back(judgement.first_bad)
        if step is None:
            self._give_up(ended.step, judgement, f"there is no checkpoint from before step {judgement.first_bad}")
        rewind = Rewind(
            at_step=ended.step,
            to_step=step,
            from_data_step=data_step(judgement.first_bad - 1, rewinds),
            until_data_step=data_step(ended.step - 1, rewinds) + 1,
            reason=judgement.reason,
        )
        if self.mesh.is_writer:
            append_to_journal(Path(config.run_dir), rewind)
        self.mesh.barrier()
        logger.warning(
            "step %d: %s. The run goes back to the checkpoint of step %d and passes over data steps %d to %d",
            ended.step,
            judgement.reason,
            step,
            rewind.from_data_step,
            rewind.until_data_step - 1,
        )

    def _give_up(self, step: int, judgement: Judgement, why: str) -> NoReturn:
        self._say("diverged", step, DIVERGED, judgement.reason)
        raise TrainingDiverged(
            f"step {step}: {judgement.reason}, and {why}; lower optim.lr={self.config.optim.lr} or set optim.clip_norm "
            f"in a new run_dir, or go on from the last checkpoint in {self.config.run_dir} with a higher "
            "resilience.max_rewinds"
        )

    def _rewinds(self) -> list[Rewind]:
        """The journal, the same on every rank. Raises JournalError."""
        return self.mesh.on_writer(lambda: read_journal(Path(self.config.run_dir)), (JournalError,))

    def _say(self, state: str, step: int, code: int | None, reason: str = "") -> None:
        if self.mesh.is_writer:
            write_status(Path(self.config.run_dir), state, step, code, reason)


def _limits(resilience: ResilienceConfig) -> dict[str, float]:
    """Seconds each phase of the watchdog may take."""
    phases = ("setup", "first_step", "step", "validation", "evaluation", "checkpoint")
    return {phase: 60 * getattr(resilience, f"{phase}_minutes") for phase in phases}


def _headline(config: Config, mesh: Mesh, parameters: int, done: int) -> str:
    start = f"continues after step {done}" if done else "starts"
    return (
        f"{config.name} {start}: {parameters / 1e6:.1f}M parameters, {config.model.backbone} x {config.memory.policy}, "
        f"engine {config.engine.name}, {mesh.size} rank(s) on {mesh.device.type}, {config.train.steps} steps, "
        f"{Path(config.run_dir)}{_cache_line(config, mesh)}"
    )


def _ending(config: Config, ended: LoopResult) -> str:
    """Whether there is more to do, for who finds nothing but a progress bar that has ended."""
    steps = config.train.steps
    if ended.stopped_by:
        how = f"was stopped by {ended.stopped_by} after step {ended.step} of {steps}; the same command goes on"
    elif ended.step < steps:
        how = f"has done train.stop_at_step={ended.step} of {steps} steps; without that setting it goes on"
    else:
        how = f"has done all {steps} steps"
    return f"{config.name} {how} (saved in {config.run_dir})"


def _cache_line(config: Config, mesh: Mesh) -> str:
    """What the memories of one rank's heads hold for a micro-batch; nothing for attention."""
    model, rows, axes = config.model, config.train.micro_batch_rows, mesh.axes
    size = merge_cache_bytes(model, config.memory, axes, rows)
    heads = model.num_heads // (axes.tensor.size * axes.context.size)
    shape = f"{rows} rows x {model.num_layers} layers x {heads} heads x {config.memory.capacity} slots"
    return f"\n  merge cache: {size:,} bytes on each rank at any context ({shape})" if size else ""


if __name__ == "__main__":
    main()
