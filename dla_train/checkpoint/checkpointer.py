"""Saving and resuming a run: which step, when, and in what order things happen.

At a save the tensors are copied to the host and training goes on; threads write, hash, flush and commit (`saving.py`).
A save that fails in between is a loud message: training goes on, older checkpoints are as they were, and the next
interval tries again. The last save of a run is waited for, and its failure is an error. Every method but `close` is
collective, and every rank learns the same outcome. What is not a tensor lies in `trainer.json`: the step, the data
cursor, the configuration and the versions. The schedules are functions of the step and need no state of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from types import TracebackType
from typing import Any

import safetensors
import torch

from dla_train.checkpoint.errors import CheckpointError, RunDirectoryError
from dla_train.checkpoint.folders import (
    checkpoint_folder,
    checkpoints_of,
    complete_steps,
    partial_folder,
    remove_incomplete,
    remove_old,
    set_aside,
)
from dla_train.checkpoint.manifest import FORMAT, TENSORS
from dla_train.checkpoint.resuming import newest_undamaged
from dla_train.checkpoint.run_lock import RunLock
from dla_train.checkpoint.saving import BackgroundSave, Part
from dla_train.checkpoint.state import Staging, restore_random_state
from dla_train.config import Config
from dla_train.logical_state import LogicalState
from dla_train.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

GRACE_SECONDS = 20.0
"""How long a process that stops on an error waits for other ranks' parts; torchrun kills 30 s after SIGTERM."""
WAIT_SHOWN_SECONDS = 1.0


@dataclass(frozen=True)
class Resumed:
    """Where a run continues."""

    step: int
    """Optimizer steps already done."""
    data: dict[str, Any]
    """The data cursor, as the batch source wrote it."""
    losses: Sequence[float] = ()
    """The last losses, by which spikes are told."""


class Checkpointer:
    """Checkpoints of one run directory, under `<run_dir>/checkpoints`. Leaving it as a context closes it."""

    def __init__(self, config: Config, mesh: Mesh, lock: RunLock | None = None) -> None:
        """`lock`, on rank 0: nothing is committed or deleted after it was lost."""
        self._config, self._mesh, self._lock = config, mesh, lock
        self.root = checkpoints_of(config.run_dir)
        self._staging = Staging(mesh.rank, mesh.size, mesh.device)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="checkpoint")
        self._saving: BackgroundSave | None = None
        self.last_complete: int | None = None
        """Step of the newest save of this process known to be complete; on rank 0 at once, elsewhere after `finish`."""

    def due(self, step: int, last: bool) -> bool:
        """Whether to save after `step`; `last` marks the step at which this process stops."""
        interval = self._config.checkpoint.interval_steps
        return last or (interval > 0 and step % interval == 0)

    def save(
        self,
        step: int,
        engine: LogicalState,
        data: dict[str, Any],
        *,
        losses: Sequence[float] = (),
        wait: bool = False,
    ) -> None:
        """Begin the checkpoint after `step` steps; the engine may go on as soon as this returns.

        `wait` returns when it is complete and raises CheckpointError, on every rank, if it cannot be. Without it a
        failure is logged. A save still in progress is waited for first.
        """
        if failed := self.finish():
            self._say("the last checkpoint failed (%s); trying again at step %d", failed, step)
        failure = None
        try:
            self._mesh.on_writer(lambda: self._prepare(step), (OSError, RunDirectoryError))
        except OSError as error:
            failure = str(error)
        if failure is None:
            part = Part(
                root=self.root,
                step=step,
                rank=self._mesh.rank,
                ranks=self._mesh.size,
                tensors=self._staging.copy(engine),
                trainer=json.dumps(self._trainer_state(step, data, losses), indent=1),
                timeout_seconds=60 * self._config.parallel.timeout_minutes,
            )
            self._saving = BackgroundSave(self._pool, part, self._check_lock, self._committed)
            if wait or not self._config.checkpoint.asynchronous:
                failure = self.finish()
        if failure is None:
            return
        message = f"the checkpoint of step {step} is not written: {failure}; older ones in {self.root} are as they were"
        if wait:
            raise CheckpointError(f"{message}; mend that, then start the same command again to go on from the newest")
        self._say("%s; training goes on, and the next save tries again", message)

    def finish(self) -> str | None:
        """Wait for the save in progress, if any. Returns why it failed, the same text on every rank, or None."""
        saving = self._saving
        if saving is None:
            return None
        started = time.perf_counter()
        reasons = self._mesh.gather(saving.written())
        failed = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
        if failed:
            saving.give_up()
        outcome = self._mesh.from_writer(saving.committed())
        self._saving = None
        waited = time.perf_counter() - started
        if waited > WAIT_SHOWN_SECONDS and self._mesh.is_writer:
            logger.info("waited %.1f s for the checkpoint of step %d", waited, saving.step)
        if failed or outcome:
            if self._mesh.is_writer:
                with contextlib.suppress(OSError):  # all ranks have stopped writing: make room
                    remove_incomplete(self.root)
            return "; ".join(failed) or str(outcome)
        self.last_complete = saving.step
        return None

    def close(self) -> None:
        """End the threads, on any way out: this rank's part is still written, and others' are given a short while."""
        if self._saving is not None:
            self._saving.give_up(GRACE_SECONDS)
            self._saving = None
        self._pool.shutdown()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def resume(self, engine: LogicalState) -> Resumed | None:
        """Load the newest checkpoint that is undamaged into `engine`, or return None where there is none.

        Raises CheckpointError where `checkpoint.resume` forbids or requires one, where all are damaged, or where it
        is of another model; then nothing has been changed.
        """
        config, shapes = self._config, engine.shapes()
        opened = newest_undamaged(self.root, shapes, self._mesh, config=config, progress=config.logging.progress)
        if opened is None:
            if self._config.checkpoint.resume == "required":
                raise CheckpointError(
                    f"checkpoint.resume=required, but {self.root} holds no complete checkpoint; "
                    "check run_dir, or set checkpoint.resume=auto to start anew"
                )
            return None
        engine.import_state(opened.tensors, opened.step)
        restore_random_state(opened.random, self._mesh.device)
        self._mesh.barrier()  # from here on the files may change: no rank reads them any more
        return Resumed(step=opened.step, data=opened.data, losses=opened.losses)

    def go_back(self, before: int) -> int | None:
        """Set aside every checkpoint from step `before` on; the step of the newest that is left, None without one.

        Collective; a save in progress is waited for. What is set aside stays on the disk under another name.
        """
        self.finish()
        return self._mesh.on_writer(lambda: self._set_aside_from(before), (CheckpointError,))

    def _set_aside_from(self, before: int) -> int | None:
        try:
            self._check_lock()
            steps = complete_steps(self.root)
            for step in steps:
                if step >= before:
                    set_aside(checkpoint_folder(self.root, step), "rewound")
        except (OSError, RunDirectoryError) as error:
            raise CheckpointError(
                f"the run cannot go back to a checkpoint from before step {before}: {error}"
            ) from error
        return max((step for step in steps if step < before), default=None)

    def _prepare(self, step: int) -> None:
        """Make the partial folder. On rank 0."""
        self._check_lock()
        self.root.mkdir(parents=True, exist_ok=True)
        remove_incomplete(self.root)
        (partial_folder(self.root, step) / TENSORS).mkdir(parents=True)

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def _committed(self, step: int) -> None:
        """Note a complete save and delete what is not to be kept. In a thread of rank 0."""
        self.last_complete = step
        settings = self._config.checkpoint
        try:
            remove_old(self.root, step, settings.keep_last, settings.keep_every_steps)
        except (OSError, CheckpointError) as error:
            logger.warning("an old checkpoint cannot be deleted: %s", error)

    def _say(self, text: str, *values: object) -> None:
        if self._mesh.is_writer:
            logger.error(text, *values)

    def _trainer_state(self, step: int, data: dict[str, Any], losses: Sequence[float]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": step,
            "data": data,
            "losses": list(losses),
            "config": dataclasses.asdict(self._config),
            "ranks": self._mesh.size,
            "versions": {
                "dla_train": own_version(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "safetensors": safetensors.__version__,
            },
        }


def own_version() -> str:
    """Version of this program as installed."""
    try:
        return metadata.version("dla-train")
    except metadata.PackageNotFoundError:
        return "not installed"
