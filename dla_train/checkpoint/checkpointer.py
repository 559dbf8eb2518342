"""Saving and resuming a run: which step, when, and in what order things happen.

`save` and `resume` are collective. What is not a tensor lies in `trainer.json`: the step, the data cursor, the
configuration and the versions. The schedules are functions of the step and need no state of their own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dla_train.checkpoint import state as tensors
from dla_train.checkpoint.folders import (
    CheckpointError,
    checkpoint_folder,
    commit,
    complete_steps,
    partial_folder,
    remove_incomplete,
    remove_old,
)
from dla_train.config import Config
from dla_train.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the folder's layout."""
TENSORS, TRAINER = "tensors", "trainer.json"


@dataclass(frozen=True)
class Resumed:
    """Where a run continues."""

    step: int
    """Optimizer steps already done."""
    data: dict[str, Any]
    """The data cursor, as the batch source wrote it."""


class Checkpointer:
    """Checkpoints of one run directory, under `<run_dir>/checkpoints`."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._config = config
        self._mesh = mesh
        self.root = Path(config.run_dir) / "checkpoints"

    def due(self, step: int, last: bool) -> bool:
        """Whether to save after `step`; `last` marks the step at which this process stops."""
        interval = self._config.checkpoint.interval_steps
        return last or (interval > 0 and step % interval == 0)

    def save(self, step: int, engine: tensors.LogicalState, data: dict[str, Any]) -> Path:
        """Write the checkpoint after `step` steps, complete or not at all; then delete old ones. Returns its folder."""
        mesh, partial = self._mesh, partial_folder(self.root, step)
        if mesh.is_writer:
            self.root.mkdir(parents=True, exist_ok=True)
            remove_incomplete(self.root)
            (partial / TENSORS).mkdir(parents=True)
        mesh.barrier()
        share = tensors.collect(engine, mesh.rank, mesh.size)
        share.update(tensors.random_state(mesh.rank, mesh.device))
        tensors.write_tensors(partial / TENSORS, share)
        if mesh.is_writer:
            (partial / TRAINER).write_text(json.dumps(self._trainer_state(step, data), indent=1), encoding="utf-8")
            commit(self.root, step)
            remove_old(self.root, self._config.checkpoint.keep_last)
        mesh.barrier()
        return checkpoint_folder(self.root, step)

    def resume(self, engine: tensors.LogicalState) -> Resumed | None:
        """Load the newest complete checkpoint into `engine`, or return None where there is none.

        Raises CheckpointError where `checkpoint.resume` forbids or requires one, or where it is of another model; then
        nothing has been changed.
        """
        step = self._mesh.from_writer(self._newest() if self._mesh.is_writer else None)
        mode = self._config.checkpoint.resume
        if step is None:
            if mode == "required":
                raise CheckpointError(
                    f"checkpoint.resume=required, but {self.root} holds no complete checkpoint; "
                    "check run_dir, or set checkpoint.resume=auto to start anew"
                )
            return None
        folder = checkpoint_folder(self.root, step)
        trainer = read_trainer_state(folder)
        shapes = engine.shapes()
        tensors.check_shapes(folder / TENSORS, shapes, ("model/", "optim/"))
        rank, device = self._mesh.rank, self._mesh.device
        random_names = [name for name in tensors.stored_tensors(folder / TENSORS) if name.startswith(f"rng/{rank}/")]
        loaded = tensors.read_tensors(folder / TENSORS, [*shapes, *random_names])
        engine.import_state(loaded, step)
        tensors.restore_random_state(loaded, rank, device)
        return Resumed(step=step, data=trainer["data"])

    def _newest(self) -> int | None:
        steps = complete_steps(self.root)
        return steps[-1] if steps else None

    def _trainer_state(self, step: int, data: dict[str, Any]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": step,
            "data": data,
            "config": dataclasses.asdict(self._config),
            "ranks": self._mesh.size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """What `trainer.json` of a checkpoint holds. Raises CheckpointError for a layout of another version."""
    trainer = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
    if trainer["format"] != FORMAT:
        raise CheckpointError(f"{folder} has layout {trainer['format']}, this version reads {FORMAT}; convert it first")
    return dict(trainer)
