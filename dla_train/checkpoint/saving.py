"""One save in the background: every rank writes its part, rank 0 commits once all parts are there.

Threads, not a process: hashing and writing let go of Python's lock, and a process would need the tensors a second time.
**No collective is issued here.** The process groups belong to the thread that trains; operations of two threads on one
group may pair up wrongly, and a group of its own would still break down with the first dead rank. Instead each rank
leaves its list of files (`part_00003.json`) in the shared folder, or the reason why there is none
(`part_00003.failed`), and rank 0's second thread looks for them. That needs the file system that the checkpoint needs
anyway, and a rank that dies costs this one checkpoint and no more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dla_train.checkpoint.errors import CheckpointError, RunDirectoryError
from dla_train.checkpoint.folders import commit, partial_folder
from dla_train.checkpoint.manifest import TRAINER, FileRecord, parse_json, read_small, write_hashed
from dla_train.checkpoint.tensor_files import write_tensor_files
from dla_train.durable import write_atomically

logger = logging.getLogger(__name__)

LONGEST_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Part:
    """What one rank has to write, and what rank 0 needs to know to commit."""

    root: Path
    """Folder of the checkpoints."""
    step: int
    rank: int
    ranks: int
    tensors: dict[str, Tensor]
    """This rank's share on the host; must not change until it is written."""
    trainer: str
    """Content of trainer.json; rank 0 writes it."""
    timeout_seconds: float
    """How long rank 0 waits for the others after its own part."""


class PartMissingError(CheckpointError):
    """A rank failed, and said so itself."""


class BackgroundSave:
    """A save that has been started. Its methods wait for this process alone and are no collectives."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        part: Part,
        before_commit: Callable[[], None],
        after_commit: Callable[[int], None],
    ) -> None:
        """`pool` has two free threads; both functions are called in rank 0's.

        before_commit: raises RunDirectoryError where this process has lost the run directory.
        after_commit: gets the step once the checkpoint is complete.
        """
        self.step = part.step
        self._part, self._before_commit, self._after_commit = part, before_commit, after_commit
        self._given_up = threading.Event()
        # reasons are texts: an exception would keep this object, and with it the process group, alive until the end
        self._writing: Future[str | None] = pool.submit(self._write)
        self._committing: Future[str | None] | None = pool.submit(self._commit) if part.rank == 0 else None

    def written(self) -> str | None:
        """Wait until this rank's part is on the disk; the reason if it is not."""
        return self._writing.result()

    def committed(self) -> str | None:
        """Wait, on rank 0, until the checkpoint is complete; the reason if it is not."""
        return self._committing.result() if self._committing else None

    def give_up(self, grace_seconds: float = 0.0) -> None:
        """Write this rank's part to its end, but on rank 0 wait only `grace_seconds` more for the others'."""
        wait_for([self._writing])
        if self._committing is not None:
            wait_for([self._committing], timeout=grace_seconds)
        self._given_up.set()

    def _write(self) -> str | None:
        part = self._part
        folder = partial_folder(part.root, part.step)
        mark = folder / f"part_{part.rank:05d}"
        try:
            files = write_tensor_files(folder, part.rank, part.tensors)
            if part.rank == 0:
                files[TRAINER] = write_hashed(folder / TRAINER, [part.trainer.encode()])
            listed = {name: [record.bytes, record.sha256] for name, record in files.items()}
            write_atomically(mark.with_suffix(".json"), json.dumps(listed))
        except OSError as error:
            logger.error(
                "the checkpoint of step %d is not written: rank %d: %s; older ones are as they were",
                *(part.step, part.rank, error),
            )
            with contextlib.suppress(OSError):  # on a full disk this makes the room for the line below
                for path in (folder / "tensors").glob(f"*-{part.rank:05d}-*"):
                    path.unlink()
            with contextlib.suppress(OSError):
                write_atomically(mark.with_suffix(".failed"), str(error))
            return str(error)
        return None

    def _commit(self) -> str | None:
        part = self._part
        try:
            files = self._collect_parts()
            self._before_commit()
            commit(part.root, part.step, files)
        except (OSError, CheckpointError, RunDirectoryError) as error:
            if not isinstance(error, PartMissingError):
                logger.error("the checkpoint of step %d cannot be completed: %s", part.step, error)
            return str(error)
        self._after_commit(part.step)
        return None

    def _collect_parts(self) -> dict[str, FileRecord]:
        """Every rank's files, once all have written theirs. Raises CheckpointError if one never will."""
        part = self._part
        folder, files = partial_folder(part.root, part.step), dict[str, FileRecord]()
        if self.written() is not None:
            raise PartMissingError("rank 0 could not write its part")
        deadline = time.monotonic() + part.timeout_seconds
        for rank in range(part.ranks):
            path = folder / f"part_{rank:05d}.json"
            self._wait_for_part(path, rank, deadline)
            for name, (size, sha256) in parse_json(path, read_small(path)).items():
                files[name] = FileRecord(size, sha256)
            path.unlink()
        return files

    def _wait_for_part(self, path: Path, rank: int, deadline: float) -> None:
        pause = 0.01
        while not path.exists():
            if path.with_suffix(".failed").exists():
                raise PartMissingError(f"rank {rank} could not write its part")
            if self._given_up.wait(pause):
                raise PartMissingError(f"rank {rank} did not write its part")
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"rank {rank} wrote no part within {self._part.timeout_seconds:.0f} s after rank 0 "
                    "(parallel.timeout_minutes); run_dir must be on a file system that all nodes share"
                )
            pause = min(2 * pause, LONGEST_POLL_SECONDS)
