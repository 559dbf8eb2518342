"""The optimizer steps of one start: train, log, validate, save, evaluate, and hear of signals and bad numbers.

Whatever decides the course of a run (stop, validate, save, go back) is a function of the step or of numbers that are
equal on every rank, so all ranks take the same turn at the same step.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor

from dla_train.checkpoint.checkpointer import Checkpointer
from dla_train.config import Config
from dla_train.data.loader import Batch, DataSources
from dla_train.data.packing import IGNORED_TARGET
from dla_train.engine import Engine
from dla_train.evaluate.bands import Bands
from dla_train.evaluate.held_out import Forward, HeldOut, held_out_loss
from dla_train.models.language_model import LanguageModelOutput
from dla_train.optim import gate_temperature, learning_rate
from dla_train.parallel.mesh import Mesh
from dla_train.resilience.diagnosis import first_not_finite
from dla_train.resilience.guard import Guard, Judgement
from dla_train.resilience.journal import Rewind, data_position, data_step
from dla_train.resilience.stopping import StopSignals
from dla_train.resilience.watchdog import Watchdog
from dla_train.run_log import RunLog, TaskMetrics
from dla_train.segments import Segment, SegmentedForward, segments_of
from dla_train.telemetry import MemoryLook

logger = logging.getLogger("dla_train.train")


@dataclass(frozen=True)
class LoopResult:
    """How a loop ended."""

    step: int
    """Optimizer steps done, over all starts."""
    loss: float | None = None
    """Training loss of the last logged step in nats per token; None if there was none."""
    validation: HeldOut | None = None
    """The last validation."""
    stopped_by: str = ""
    """The signal that ended it; everything is saved."""
    judgement: Judgement | None = None
    """Why the run has to go back to a checkpoint."""


class Evaluation(Protocol):
    """Published tasks that are asked of the weights as they stand; harness/in_training.py makes it."""

    @property
    def names(self) -> Sequence[str]:
        """Of the tasks."""

    def run(
        self, names: Sequence[str], weights: Iterator[tuple[str, Tensor]], stop: Callable[[], bool]
    ) -> Iterator[tuple[str, TaskMetrics]]:
        """The metrics of each of `names` as it is done; ends early where `stop`, asked often, is true. Collective.

        weights: the model's logical names and whole tensors. Changes nothing that training reads.
        """


@dataclass(frozen=True)
class Loop:
    """What a run's steps need, made by `train.py`."""

    config: Config
    mesh: Mesh
    sources: DataSources
    engine: Engine
    checkpointer: Checkpointer
    log: RunLog
    signals: StopSignals
    watchdog: Watchdog
    rewinds: Sequence[Rewind]
    """All returns to checkpoints so far: they say which data a step reads."""
    guard: Guard
    evaluation: Evaluation | None = None

    def run(self, done: int) -> LoopResult:
        """Train until the last step, a signal, or a judgement; `done` steps were done before this start."""
        begun, guard, result, owed = done, self.guard, LoopResult(done), False
        last = self.config.train.last_step
        stopped_by = self._evaluate(done)  # what an earlier start did not finish
        self.log.clock.restart()
        while done < last:
            if stopped_by := stopped_by or self.signals.agreed(self.mesh):
                if done > begun:
                    self._save(done, wait=True)
                return replace(result, stopped_by=stopped_by)
            self.watchdog.enter("step" if done > begun else "first_step")
            step = self._train_step(done, wants_loss=guard.wants_losses)
            done += 1
            loss = result.loss if step.loss is None else step.loss
            result = replace(result, step=done, loss=loss)
            judgement = guard.judge(done, step.loss, skipped=not step.applied)
            if not step.applied:
                self._explain(done, step.batches, step.grad_norm)
            if judgement.rewind:
                return replace(result, judgement=judgement)
            if self._validation_due(done):
                with self.watchdog.phase("validation"):
                    result = replace(result, validation=self._validate(done))
            owed = owed or self.checkpointer.due(done, done == last)
            if owed and (done == last or not guard.doubts):  # else good checkpoints would make room for bad ones
                self._save(done, wait=done == last)
                owed = False
            stopped_by = self._evaluate(done)  # after the save, which a long evaluation must not put at risk
        return replace(result, stopped_by=stopped_by)

    def _train_step(self, done: int, *, wants_loss: bool) -> _Step:
        """Step `done` + 1, with its line where one is due."""
        config, clock, step = self.config, self.log.clock, done + 1
        due = self.log.due(step)
        clock.synchronize = due
        with clock.phase("data"):
            batches = self.sources.train.batch(
                data_step(done, self.rewinds), self.mesh.data_rank, self.mesh.data_size, config.train.micro_batch_rows
            )
        with clock.phase("exchange"):
            targets = self._target_count(batches)
        temperature = gate_temperature(config.memory, config.train.steps, step)
        sums = torch.zeros(2, device=self.mesh.device)
        look = MemoryLook(self.engine.module, self.mesh) if self.log.look_due(step) else None
        for index, batch in enumerate(batches):
            forward = SegmentedForward(self.engine.module, self.mesh.device)
            for segment in segments_of(batch, config.train.segment_tokens):
                with clock.phase("forward"):
                    nats, partition = self._losses(forward, segment, temperature, None if index else look)
                with clock.phase("backward"):
                    last = segment.last and index == len(batches) - 1
                    self.engine.backward((nats + partition) / targets, last=last)
                sums += torch.stack([nats.detach(), partition.detach()])
        lr = learning_rate(config.optim, config.train.steps, step)
        with clock.phase("step"):
            taken = self.engine.step(lr)
        self.log.end_step(self.sources.train.tokens_per_step)
        if look is not None:
            self.log.memory(step, look)
        loss = None
        if due or wants_loss:
            with clock.phase("exchange"):
                loss, partition_loss = (self.mesh.sum(sums, self.mesh.axes.batch) / targets).tolist()
            if due:
                numbers = {"loss": loss, "lr": lr, "grad_norm": taken.grad_norm}
                numbers |= self.sources.train.numbers(data_position(step, self.rewinds))
                self.log.training(step, numbers | ({"z_loss": partition_loss} if config.optim.z_loss else {}))
        return _Step(loss, taken.grad_norm, taken.applied, batches)

    def _losses(
        self, forward: SegmentedForward, segment: Segment, temperature: float, look: MemoryLook | None = None
    ) -> tuple[Tensor, Tensor]:
        logits, targets = forward(segment, gate_temperature=temperature, observe=look)
        nats, partition, _ = self.engine.module.token_loss(logits, targets, self.config.optim.z_loss)
        return nats, partition

    def _loss(self, forward: SegmentedForward, segment: Segment, temperature: float) -> Tensor:
        nats, partition = self._losses(forward, segment, temperature)
        return nats + partition

    def _target_count(self, batches: list[Batch]) -> Tensor:
        """Targets of the global batch: the loss is their mean, however they are spread over ranks and micro-batches."""
        here = torch.stack([(batch.targets != IGNORED_TARGET).sum() for batch in batches]).sum()
        return self.mesh.sum(here, self.mesh.axes.data).clamp_min(1)

    def _explain(self, step: int, batches: list[Batch], grad_norm: float) -> None:
        """Say where numbers first went wrong in a step that was left out. Collective."""
        temperature = gate_temperature(self.config.memory, self.config.train.steps, step)
        losses = []
        for batch in batches:
            forward = SegmentedForward(self.engine.module, self.mesh.device)
            segments = segments_of(batch, self.config.train.segment_tokens)
            losses += [functools.partial(self._loss, forward, segment, temperature) for segment in segments]
        found = self.mesh.gather(first_not_finite(self.engine.module, losses))
        self.log.drop_counts()
        where = "; ".join(f"rank {rank}: {what}" for rank, what in enumerate(found) if what)
        again = "everything is finite when the same rows are computed again: look at the hardware"
        logger.warning("step %d is left out: its gradient norm is %s. %s", step, grad_norm, where or again)
        self.log.clock.restart()

    def _save(self, done: int, *, wait: bool) -> None:
        with self.watchdog.phase("checkpoint"):
            if not (wait and self._is_saved(done)):
                cursor = self.sources.train.state(data_position(done, self.rewinds))
                self.checkpointer.save(done, self.engine, cursor, losses=self.guard.losses, wait=wait)
        self.log.clock.restart()

    def _is_saved(self, done: int) -> bool:
        """Whether the save in progress, or the last one, is of this step and complete. Collective."""
        self.checkpointer.finish()
        return self.checkpointer.last_complete == done

    def _evaluate(self, done: int) -> str:
        """Ask the tasks that are due after step `done`; the signal that ended it early, by name, "" for none."""
        if self.evaluation is None or not self._evaluation_due(done):
            return ""
        known = self.log.evaluated(done)
        wanted = [name for name in self.evaluation.names if name not in known]
        if not wanted:
            return ""
        weights = takewhile(lambda named: named[0].startswith("model/"), self.engine.export_state())
        finished = 0
        with self.watchdog.phase("evaluation"):
            for name, metrics in self.evaluation.run(wanted, weights, lambda: bool(self.signals.agreed(self.mesh))):
                self.log.evaluation(done, name, metrics)
                finished += 1
                self.watchdog.enter("evaluation")
        self.log.clock.restart()
        return self.signals.agreed(self.mesh) if finished < len(wanted) else ""

    def _evaluation_due(self, step: int) -> bool:
        interval = self.config.evaluation.interval_steps
        return step > 0 and (step == self.config.train.steps or (interval > 0 and step % interval == 0))

    def _validation_due(self, step: int) -> bool:
        train = self.config.train
        interval = train.validation_interval_steps
        return train.validation_batches > 0 and (step == train.steps or (interval > 0 and step % interval == 0))

    def _validate(self, step: int) -> HeldOut:
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
            nats=module.token_nats,
            axes=axes,
            bands=Bands.of(self.config.data.context_tokens, train.validation_band_edges_tokens),
            soft_forward=self._soft_forward(step) if self.config.memory.softly_gated else None,
            segment_tokens=train.segment_tokens,
        )
        module.train()
        self.log.validation(step, result)
        self.log.clock.restart()
        return result

    def _soft_forward(self, step: int) -> Forward:
        """The forward of training, boundaries as soft as they are at `step`, of a model in evaluation mode."""
        module = self.engine.module
        temperature = gate_temperature(self.config.memory, self.config.train.steps, step)

        def forward(tokens: Tensor, cu_seqlens: Tensor, **carried: Any) -> LanguageModelOutput:
            module.train()
            output = module(tokens, cu_seqlens, gate_temperature=temperature, **carried)
            module.eval()
            return output

        return forward


@dataclass(frozen=True)
class _Step:
    """What one optimizer step leaves."""

    loss: float | None
    grad_norm: float
    applied: bool
    batches: list[Batch]
