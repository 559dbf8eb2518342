"""One run of a study: train a small model on a recall task, and ask it at the end and on the way.

The batches depend on the seed alone and the weights on seed and name, so two arms of a seed begin alike and see the
same rows in the same order. Rows to train on are never repeated; what an arm is judged on comes from another stream.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_train.config import Config
from dla_train.models.language_model import LanguageModel
from dla_train.optim import build_optimizer, gate_temperature, learning_rate
from dla_train.recall.model import build_recall_model, token_ids
from dla_train.recall.settings import StudyConfig
from dla_train.recall.tasks.streams import stream
from dla_train.recall.tasks.task import IGNORED, RecallBatch, RecallTask

ROWS_AT_ONCE = 256
"""Rows that go through a model at once where it is judged."""


@dataclass(frozen=True)
class Judgement:
    """How a model does on one part's held-out rows, with the boundaries of inference."""

    accuracy: float
    """Share of right answers."""
    loss: float
    """Nats per answer."""
    soft_loss: float | None
    """Nats per answer with the boundaries of training, where those are soft."""


@dataclass(frozen=True)
class RunResult:
    """What is kept of a run."""

    parts: dict[str, Judgement]
    curve: list[tuple[int, dict[str, float]]]
    """Accuracy on each part by step."""
    boundary_rate: float | None
    """Boundaries per token on the held-out rows; None without a memory."""
    live_slots: float | None
    """Mean number of live slots there."""
    seconds: float
    """Wall time of training, the curve included."""

    def steps_to(self, part: str, accuracy: float) -> int | None:
        """First point of the learning curve that reaches `accuracy` on `part`; None if none does."""
        return next((step for step, found in self.curve if found[part] >= accuracy), None)


class PartDraw:
    """Which part each step trains on, and its rows: the same in every arm of a seed."""

    def __init__(self, tasks: Mapping[str, RecallTask], weights: Mapping[str, float], seed: int) -> None:
        """weights: odds by part; empty is equal odds."""
        self._tasks = list(tasks.values())
        self._odds = torch.tensor([weights.get(part, 0.0) if weights else 1.0 for part in tasks])
        self._generator = stream(seed, "train")

    def batch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Token ids and targets of `rows` rows of one part, both [B, T]."""
        task = self._tasks[int(torch.multinomial(self._odds, 1, generator=self._generator))]
        return _tensors(task, task.batch(rows, self._generator))


def train_run(
    study: StudyConfig, config: Config, tasks: Mapping[str, RecallTask], split: str, device: torch.device
) -> RunResult:
    """Train the model of `config` and judge it on rows of `split`: `held_out`, or `tuning` to choose a learning rate.

    Raises FloatingPointError where the loss is not finite.
    """
    some = next(iter(tasks.values()))
    model = build_recall_model(config, some.vocabulary, device, study.decay_rate, study.step_size)
    optimizer = build_optimizer(model, config.optim)
    draw = PartDraw(tasks, study.weights, config.seed)
    curve = []
    began = time.perf_counter()
    for step in range(1, config.train.steps + 1):
        _train_step(model, optimizer, draw.batch(config.train.global_batch_rows), config, step, device)
        if step % study.curve_interval_steps == 0 or step == config.train.steps:
            found = judge(model, tasks, study.curve_rows, split, soft=False)
            curve.append((step, {part: judged.accuracy for part, judged in found.items()}))
    seconds = time.perf_counter() - began
    model.reset_memory_statistics()
    parts = judge(model, tasks, study.held_out_rows, split, soft=config.memory.softly_gated)
    boundaries, decisions, live = model.memory_statistics().sum((0, 1)).tolist()
    rate, slots = (boundaries / decisions, live / decisions) if decisions else (None, None)
    return RunResult(parts, curve, rate, slots, seconds)


def _train_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    config: Config,
    step: int,
    device: torch.device,
) -> None:
    ids, targets = (tensor.to(device) for tensor in batch)
    model.train()
    temperature = gate_temperature(config.memory, config.train.steps, step)
    positions, answers = _asked(targets)
    logits = model(ids, gate_temperature=temperature, positions=positions).logits
    loss = F.cross_entropy(logits.float(), answers)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or float("inf"))
    if not torch.isfinite(norm):
        raise FloatingPointError(f"step {step}: loss {loss.item()}, gradient norm {norm.item()}; use a lower rate")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, config.train.steps, step)
    optimizer.step()
    if config.memory.tau_control == "rate":
        model.control_tau(model.memory_statistics())
    model.reset_memory_statistics()


@torch.no_grad()
def judge(
    model: LanguageModel, tasks: Mapping[str, RecallTask], rows: int, split: str, *, soft: bool
) -> dict[str, Judgement]:
    """Accuracy and loss on `rows` rows of every part; the same rows for every model, and none of those trained on."""
    found = {}
    for number, (part, task) in enumerate(tasks.items()):
        generator = stream(number, split)
        batches = [
            _tensors(task, task.batch(min(ROWS_AT_ONCE, rows - first), generator))
            for first in range(0, rows, ROWS_AT_ONCE)
        ]
        right, nats, answers = _totals(model.eval(), batches)
        softly = _totals(model.train(), batches)[1] / answers if soft else None
        found[part] = Judgement(right / answers, nats / answers, softly)
    model.train()
    return found


def _totals(model: LanguageModel, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float, int]:
    """Right answers, nats and answers."""
    device = model.final_norm.weight.device
    right, nats, answers = 0.0, 0.0, 0
    for ids, targets in batches:
        positions, wanted = _asked(targets.to(device))
        logits = model(ids.to(device), positions=positions).logits.float()
        right += float((logits.argmax(-1) == wanted).sum())
        nats += float(F.cross_entropy(logits, wanted, reduction="sum"))
        answers += len(wanted)
    return right, nats, answers


def _asked(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where something is asked in targets [B, T], b * T + t, and what: both [N]."""
    flat = targets.flatten()
    positions = (flat != IGNORED).nonzero()[:, 0]
    return positions, flat[positions]


def _tensors(task: RecallTask, batch: RecallBatch) -> tuple[Tensor, Tensor]:
    return token_ids(batch.inputs, task.vocabulary), batch.targets
