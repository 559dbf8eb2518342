"""What two ranks do with checkpoints, under torchrun: `rank_worker.py FOLDER`; each writes its findings as JSON."""

import errno
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from dla_train.checkpoint import saving
from dla_train.checkpoint.checkpointer import Checkpointer
from dla_train.checkpoint.errors import CheckpointError, RunDirectoryError
from dla_train.checkpoint.folders import complete_steps
from dla_train.checkpoint.run_directory import hold_run_directory, write_run_files
from dla_train.parallel.mesh import Mesh
from tests.checkpoint.small_runs import DATA, SmallState, make_config

WRITE = saving.write_tensor_files


def disk_of_rank_1_is_full(folder: Path, rank: int, tensors: Any) -> Any:
    if rank == 1:
        raise OSError(errno.ENOSPC, "No space left on device")
    return WRITE(folder, rank, tensors)


def failing_saves(checkpointer: Checkpointer, state: SmallState, found: dict[str, Any]) -> None:
    """One rank cannot write: in between it is a message, at the end the same error on both."""
    saving.write_tensor_files = disk_of_rank_1_is_full
    checkpointer.save(4, state, DATA)
    found["failed in between"] = checkpointer.finish()
    try:
        checkpointer.save(5, state, DATA, wait=True)
    except CheckpointError as error:
        found["failed at the end"] = str(error)
    saving.write_tensor_files = WRITE


def resumes(mesh: Mesh, checkpointer: Checkpointer, found: dict[str, Any]) -> None:
    """Damage in a file that one rank alone hashes is damage to both."""
    state = SmallState(-1.0)
    random = torch.get_rng_state()
    resumed = checkpointer.resume(state)
    found["resumed"] = resumed and (resumed.step, state.value())
    found["random state went on"] = not torch.equal(random, torch.get_rng_state())
    if mesh.is_writer:
        path = next((checkpointer.root / "step_00000006").rglob("optim-00001-*"))
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    mesh.barrier()
    resumed = checkpointer.resume(state)
    found["resumed after damage"] = resumed and (resumed.step, state.value())


def main() -> None:
    folder = Path(sys.argv[1])
    logging.disable(logging.CRITICAL)
    found: dict[str, Any] = {}
    config = make_config(folder, "checkpoint.keep_last=0")
    with Mesh.start(config) as mesh:
        with hold_run_directory(config, {}, mesh) as lock, Checkpointer(config, mesh, lock) as checkpointer:
            write_run_files(config, "", {}, mesh)
            state = SmallState(3.0)
            checkpointer.save(3, state, DATA)
            state.train(4.0)
            found["finished"] = checkpointer.finish()
            found["last complete"] = checkpointer.last_complete
            failing_saves(checkpointer, state, found)
            state.train(6.0)
            torch.manual_seed(mesh.rank)
            checkpointer.save(6, state, DATA, wait=True)
            found["complete"] = complete_steps(checkpointer.root)
            torch.manual_seed(100)
            resumes(mesh, checkpointer, found)
            try:
                with hold_run_directory(config, {}, mesh):
                    pass
            except RunDirectoryError as error:
                found["second holder"] = str(error)
        (folder / f"rank{mesh.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
