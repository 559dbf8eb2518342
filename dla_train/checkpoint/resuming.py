"""Choosing the checkpoint to go on from: the newest one of which every byte is what was written. Collective.

The files are dealt to the ranks for hashing, and all ranks hear what each found, so they agree on the checkpoint. One
that is damaged is set aside under another name, loudly, and the one before it is tried; any other fault (another model,
a folder that may not be read, another layout) is an error and passes over nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from dla_train.checkpoint.errors import CheckpointError, DamagedError
from dla_train.checkpoint.folders import checkpoint_folder, find_checkpoints, put_back_replaced, set_aside
from dla_train.checkpoint.manifest import deal
from dla_train.checkpoint.run_directory import check_model_settings
from dla_train.checkpoint.state import check_shapes, stored_random_state
from dla_train.checkpoint.stored import StoredCheckpoint
from dla_train.checkpoint.tensor_files import StoredTensors
from dla_train.config import Config
from dla_train.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was checked and fits the model."""

    step: int
    data: dict[str, Any]
    """The data cursor."""
    losses: tuple[float, ...]
    """The last losses before it."""
    tensors: StoredTensors
    random: dict[str, Tensor]
    """Random state of this rank, by device type; empty for a rank that the saved run did not have."""


def newest_undamaged(
    root: Path,
    shapes: Mapping[str, tuple[int, ...]],
    mesh: Mesh,
    *,
    config: Config | None = None,
    progress: bool = False,
) -> Opened | None:
    """Open the checkpoint to go on from; None where there is none at all.

    shapes: of the engine's tensors. config: whose model and memory it must have; None compares shapes alone. Raises
    CheckpointError, the same on every rank, where all are damaged and for every fault that is not damage.
    """
    steps = mesh.on_writer(lambda: _marked_steps(root), (CheckpointError,))
    for step in reversed(steps):
        folder = checkpoint_folder(root, step)
        opened, error = _open(folder, step, shapes, mesh, config, progress)
        worst = _worst(mesh.gather(error))
        if worst is None:
            return opened
        if not isinstance(worst, DamagedError):
            raise worst
        if mesh.is_writer:
            _set_aside(folder, worst)
        mesh.barrier()
    if steps:
        raise CheckpointError(
            f"every checkpoint in {root} is damaged; they are kept there under other names. Put one back from a copy, "
            "or choose another run_dir to start anew"
        )
    return None


def _marked_steps(root: Path) -> list[int]:
    try:
        put_back_replaced(root)
    except OSError as error:
        mend = "give this user the right to change it"
        raise CheckpointError(f"{root} cannot be put in order: {error}; {mend}") from error
    return [found.step for found in find_checkpoints(root)]


def _open(
    folder: Path,
    step: int,
    shapes: Mapping[str, tuple[int, ...]],
    mesh: Mesh,
    config: Config | None,
    progress: bool,
) -> tuple[Opened | None, CheckpointError | None]:
    """Hash this rank's share of the files, then read all that is small."""
    try:
        checkpoint = StoredCheckpoint(folder, step)
        sizes = {name: record.bytes for name, record in checkpoint.manifest.files.items()}
        share = deal(sizes, mesh.size)[mesh.rank]
        total = sum(sizes[name] for name in share)
        hidden = not (progress and mesh.is_writer)
        with tqdm(
            total=total, unit="B", unit_scale=True, desc=f"checking {folder.name}", disable=hidden, delay=2
        ) as bar:
            checkpoint.verify(share, bar.update)
        trainer, tensors = checkpoint.trainer(), checkpoint.tensors("model", "optim", "rng")
        if config is not None:
            check_model_settings(folder, trainer["config"], config)
        check_shapes(folder, tensors, shapes)
        random = stored_random_state(folder, tensors, mesh.rank, mesh.device)
    except CheckpointError as error:
        return None, error
    return Opened(checkpoint.manifest.step, trainer["data"], tuple(trainer["losses"]), tensors, random), None


def _worst(errors: list[CheckpointError | None]) -> CheckpointError | None:
    """The ranks' first damage, which explains whatever else went wrong; else their first error."""
    found = [error for error in errors if error is not None]
    return next((error for error in found if isinstance(error, DamagedError)), found[0] if found else None)


def _set_aside(folder: Path, damage: DamagedError) -> None:
    try:
        logger.error("%s. It is now %s; an older checkpoint is tried", damage, set_aside(folder).name)
    except OSError as error:
        logger.error("%s. It cannot be set aside (%s); an older checkpoint is tried", damage, error)
