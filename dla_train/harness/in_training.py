"""Published tasks asked during training: the documents are read once, the questions put to a copy of the weights.

The copy is a whole model of one rank in float32, built from the logical tensors that a checkpoint would hold. So the
numbers are those of `dla-evaluate` on that checkpoint, every layout and ZeRO stage is evaluated alike, all ranks share
the work, and nothing of the model in training is touched: its mode, its counts, its tau. It costs 4 bytes a parameter
on every rank while it exists, at a moment when there are no activations.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from lm_eval.api.task import Task
from torch import Tensor

from dla_train.config import Config
from dla_train.data.tokenizer import Tokenizer
from dla_train.harness.asking import Metrics, ask
from dla_train.harness.errors import EvaluateError
from dla_train.harness.inputs import needles_of
from dla_train.harness.model import DlaModel
from dla_train.harness.scoring import Request, Score
from dla_train.harness.settings import EvaluateConfig, Unit, units
from dla_train.harness.tasks import build_task
from dla_train.models.build import meta_model
from dla_train.models.language_model import LanguageModel
from dla_train.parallel.mesh import Mesh
from dla_train.run_log import TaskMetrics


class _Stopped(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop; passes through lm_eval, on every rank after the same round."""


class TrainingEvaluation:
    """The tasks of a run (a loop.Evaluation)."""

    def __init__(self, config: Config, settings: EvaluateConfig, mesh: Mesh, tokenizer: Tokenizer, bos: bool) -> None:
        """Read every document and go through every question once, without a model: whatever is wrong with them shows.

        Raises EvaluateError.
        """
        self._config, self._settings, self._mesh, self._tokenizer, self._bos = config, settings, mesh, tokenizer, bos
        self._tasks: dict[str, tuple[Unit, Task]] = {}
        rehearsal = _Rehearsal(meta_model(config), tokenizer, max_length=self._max_length, bos=bos)
        with kept_random_state(mesh.device):
            for unit in units(settings):
                task = build_task(unit, settings, needles_of(settings, unit, tokenizer, bos))
                self._tasks[unit.name] = unit, task
                try:
                    self._ask(rehearsal, unit.name)
                except EvaluateError as error:
                    raise EvaluateError(f"evaluation of {unit.name}: {error}") from error

    @property
    def names(self) -> Sequence[str]:
        """Of the tasks, a needle task's with its length."""
        return list(self._tasks)

    def run(
        self, names: Sequence[str], weights: Iterator[tuple[str, Tensor]], stop: Callable[[], bool]
    ) -> Iterator[tuple[str, TaskMetrics]]:
        """The metrics of each task as it is done, as loop.Evaluation says."""

        def between() -> None:
            if stop():
                raise _Stopped

        model = DlaModel(
            whole_copy(self._config, weights, self._mesh.device),
            self._tokenizer,
            max_length=self._max_length,
            bos=self._bos,
            batch_tokens=self._settings.batch_tokens,
            decode_rows=self._settings.decode_rows,
            progress=self._settings.progress and self._mesh.is_writer,
            mesh=self._mesh,
            between=between,
        )
        for name in names:
            try:
                with kept_random_state(self._mesh.device):
                    metrics = self._ask(model, name)
            except _Stopped:
                return
            yield name, _plain(metrics)

    @property
    def _max_length(self) -> int:
        assert self._settings.max_length is not None  # planned.py
        return self._settings.max_length

    def _ask(self, model: DlaModel, name: str) -> Metrics:
        unit, task = self._tasks[name]
        with model.unit(name, unit.length or self._max_length, journal=None):
            return ask(model, unit, self._settings, task)[0]


class _Rehearsal(DlaModel):
    """Looks at every question as the model would, and answers without computing anything."""

    def _scores(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Score]]]:
        yield [(index, Score(0.0, False)) for index in range(len(requests))]

    def _answers(
        self, prompts: Sequence[tuple[int, ...]], new_tokens: int, until: tuple[str, ...]
    ) -> Iterator[list[tuple[int, list[int]]]]:
        yield [(index, [self.eot_token_id]) for index in range(len(prompts))]


def _plain(metrics: Metrics) -> TaskMetrics:
    found = {}
    for metric, numbers in metrics.items():
        value = numbers["value"]
        assert value is not None
        found[metric] = value, numbers["stderr"]
    return found


@torch.no_grad()
def whole_copy(config: Config, weights: Iterator[tuple[str, Tensor]], device: torch.device) -> LanguageModel:
    """The model of a run on one rank, in evaluation mode, with copies of `weights` by logical name."""
    model = meta_model(config).to_empty(device=device)
    state = model.state_dict()
    copied = set()
    for name, tensor in weights:
        state[name.removeprefix("model/")].copy_(tensor)
        copied.add(name.removeprefix("model/"))
    assert copied == set(state), copied ^ set(state)
    model.reset_memory_statistics()
    return model.eval()


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """What draws from the global generators inside leaves no trace outside: lm_eval's tasks are seeded."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
