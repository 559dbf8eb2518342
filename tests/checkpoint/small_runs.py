"""The least that a checkpoint can hold, and the configuration of a run whose data nobody opens."""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dla_train.checkpoint.checkpointer import Checkpointer
from dla_train.config import Config
from dla_train.hydra_app import compose
from dla_train.parallel.mesh import Mesh
from tests.train.runs import TINY

DATA = {"tokens": 64, "fingerprint": "abc"}


class SmallState:
    """Three tensors where an engine has hundreds; `value` is in all of them."""

    def __init__(self, value: float = 0.0) -> None:
        self.state = {
            "model/table": torch.full((5, 3), value),
            "model/scalar": torch.full((), value),
            "optim/table/exp_avg": torch.full((5, 3), value),
        }
        self.steps = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.state.items()

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        self.state, self.steps = {name: state[name].clone() for name in self.state}, steps

    def train(self, value: float) -> None:
        """What an optimizer step does: change the same storage."""
        for tensor in self.state.values():
            tensor.fill_(value)

    def value(self) -> float:
        """The value of all tensors; an error if they differ."""
        values = {number for tensor in self.state.values() for number in tensor.reshape(-1).tolist()}
        (only,) = values
        return only


def make_config(folder: Path, *overrides: str) -> Config:
    """Configuration of a run in folder/run."""
    return dataclasses.replace(_composed(overrides), run_dir=f"{folder}/run")


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Config:
    data = ["data.train=[nowhere]", "data.tokenizer=nowhere.model", "data.validation=[]"]
    return compose([*TINY, *data, "run_dir=nowhere", *overrides])


@contextmanager
def checkpointer_of(config: Config) -> Iterator[Checkpointer]:
    with Mesh.start(config) as mesh, Checkpointer(config, mesh) as checkpointer:
        yield checkpointer


def write_checkpoints(folder: Path, *steps: int, overrides: tuple[str, ...] = ("checkpoint.keep_last=0",)) -> Path:
    """Save `steps`, each with its number as the value; returns the folder of the checkpoints."""
    state = SmallState()
    with checkpointer_of(make_config(folder, *overrides)) as checkpointer:
        for step in steps:
            state.train(step)
            checkpointer.save(step, state, DATA, wait=True)
        return checkpointer.root


def resumed_value(folder: Path, *overrides: str) -> tuple[int | None, float]:
    """(step resumed from, value of the tensors then)."""
    state = SmallState(-1.0)
    with checkpointer_of(make_config(folder, *overrides)) as checkpointer:
        resumed = checkpointer.resume(state)
    return (resumed.step if resumed else None), state.value()


def errors_of(caplog_records: list[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in caplog_records if record.levelno >= logging.ERROR]
