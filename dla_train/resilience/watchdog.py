"""Ends a process that hangs, after writing down where: a limit for each phase of a run, since all differ.

A thread looks at the clock. When a phase is over its limit it writes the stacks of all threads (and on CUDA NCCL's
flight recorder) to `<run_dir>/hangs/`, and ends the process with its own exit code, so that a launcher restarts the
job. The other ranks, waiting for this one, do the same. Should this thread not get to run, because something holds
Python's lock, `faulthandler` does as much from C a minute later.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import torch

from dla_train.resilience.exit_codes import HUNG

logger = logging.getLogger(__name__)

GRACE_SECONDS = 60.0
"""How long after its limit a phase is left to faulthandler, which writes stacks alone and exits with 1."""


class Watchdog:
    """Watches this process while it is entered. `limits`: seconds by phase; one that is absent or 0 has none."""

    def __init__(self, limits: Mapping[str, float], folder: Path, rank: int) -> None:
        self._limits, self._folder, self._rank = dict(limits), folder, rank
        self._phase, self._since = "", time.monotonic()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if any(self._limits.values()):
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive():
            self._thread.join()

    def enter(self, phase: str) -> None:
        """From now on this process is in `phase`, whose clock starts anew."""
        with self._lock:
            self._phase, self._since = phase, time.monotonic()
        limit = self._limits.get(phase, 0.0)
        faulthandler.cancel_dump_traceback_later()
        if limit and sys.__stderr__ is not None:  # sys.stderr may be a notebook's, which is no file
            faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True, file=sys.__stderr__)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Be in phase `name` inside the block, and in the one before, anew, after it."""
        before = self._phase
        self.enter(name)
        yield
        self.enter(before)

    def _watch(self) -> None:
        shortest = min(limit for limit in self._limits.values() if limit)
        while not self._ended.wait(min(1.0, shortest / 4)):
            with self._lock:
                phase, seconds = self._phase, time.monotonic() - self._since
            limit = self._limits.get(phase, 0.0)
            if limit and seconds > limit:
                self._end(phase, seconds, limit)

    def _end(self, phase: str, seconds: float, limit: float) -> None:
        where = self._write_stacks(phase, seconds)
        logger.critical(
            "rank %d hangs: %.0f s in phase %s, whose limit is %.0f s; stacks are in %s. The process ends; the same "
            "command goes on from the last checkpoint",
            self._rank,
            seconds,
            phase,
            limit,
            where,
        )
        os._exit(HUNG)

    def _write_stacks(self, phase: str, seconds: float) -> Path:
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        path = self._folder / f"{moment}_rank{self._rank}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"rank {self._rank}: {seconds:.0f} s in phase {phase}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            if torch.cuda.is_available():
                path.with_suffix(".nccl").write_bytes(_flight_recorder())
        except OSError as error:  # a full or lost disk must not keep a hung process alive
            logger.critical("rank %d: stacks could not be written to %s: %s", self._rank, path, error)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        return path


def _flight_recorder() -> bytes:
    """NCCL's last collectives, as torch.distributed.flight_recorder reads them (`torchfrtrace`)."""
    return bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]
