"""A complete checkpoint opened for reading: by the trainer, by evaluation and by `dla-checkpoint` alike.

Every file is hashed before anything of it is used. Reading what was just hashed mostly hits the page cache, so the
check costs the hashing (about 0.5 s a GB and thread) and the ranks of a run share it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from pathlib import Path
from typing import Any

from dla_train.checkpoint.errors import CheckpointError, DamagedError
from dla_train.checkpoint.folders import checkpoints_of, find_checkpoints
from dla_train.checkpoint.manifest import (
    MARKER,
    TRAINER,
    Manifest,
    check_file,
    is_count,
    parse_json,
    read_manifest,
    read_small,
)
from dla_train.checkpoint.tensor_files import StoredTensors

logger = logging.getLogger(__name__)

HASHING_THREADS = 4
"""Most threads that hash in one process; a disk is seldom faster than they are."""


class StoredCheckpoint:
    """One checkpoint whose manifest holds and whose files have their sizes; hashes are compared by `verify`."""

    def __init__(self, folder: Path, step: int | None = None) -> None:
        """`step` is the one it must be of, if that is known.

        Raises DamagedError, and CheckpointError for another layout or files that may not be read.
        """
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder, step)

    @property
    def sha256(self) -> str:
        """Of the manifest, which holds the sha256 of every file: what tells this checkpoint from every other."""
        return (self.folder / MARKER).read_text(encoding="utf-8").split()[0]

    def verify(self, names: Sequence[str] | None = None, progress: Callable[[int], object] | None = None) -> None:
        """Hash the named files (default: all) in a few threads. Raises DamagedError for the first that differs."""
        chosen = sorted(self.manifest.files) if names is None else names
        threads = max(1, min(HASHING_THREADS, os.cpu_count() or 1, len(chosen)))
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(lambda name: check_file(self.folder, name, self.manifest.files[name], progress), chosen):
                pass

    def trainer(self) -> dict[str, Any]:
        """What is not a tensor: step, data cursor, configuration, versions. Raises DamagedError.

        Cursor and configuration are checked by those they belong to.
        """
        path = self.folder / TRAINER
        state = parse_json(path, read_small(path))
        if state.get("step") != self.manifest.step or not is_count(state["step"]):
            raise DamagedError(f"{path} is of step {state.get('step')!r:.20}, its folder of {self.manifest.step}")
        for key in ("data", "config", "versions"):
            if not isinstance(state.get(key), dict):
                raise DamagedError(f"{path} lacks {key}")
        losses = state.setdefault("losses", [])
        if not isinstance(losses, list) or not all(isinstance(loss, float) and isfinite(loss) for loss in losses):
            raise DamagedError(f"{path}: losses are not a list of numbers")
        return state

    def tensors(self, *kinds: str) -> StoredTensors:
        """Tensors of some kinds ("model", "optim", "rng"), each read when asked for. Raises DamagedError."""
        return StoredTensors(self.folder, self.manifest.of_kind(*kinds))


def open_step(run_dir: str | Path, step: int | None = None) -> tuple[StoredCheckpoint, int]:
    """(a checkpoint of a run, its step), unhashed yet; `step` None takes the newest complete one.

    Raises CheckpointError where it is absent, naming those there are, or cannot be used.
    """
    root = checkpoints_of(run_dir)
    found = {checkpoint.step: checkpoint for checkpoint in find_checkpoints(root)}
    usable = [number for number, checkpoint in found.items() if checkpoint.fault is None]
    if not found:
        absent = "" if root.parent.exists() else f": there is no folder {root.parent.absolute()}"
        raise CheckpointError(f"{root} holds no complete checkpoint; train first, or check the path{absent}")
    if step is not None and step not in found:
        raise CheckpointError(f"{root} has no checkpoint of step {step}; choose from {', '.join(map(str, usable))}")
    chosen = found[step if step is not None else max(usable, default=max(found))]
    if chosen.fault is not None:
        raise chosen.fault
    for passed_over in found.values():
        if step is None and passed_over.step > chosen.step:
            logger.warning("step %d is taken: %s", chosen.step, passed_over.fault)
    return StoredCheckpoint(chosen.folder, chosen.step), chosen.step
