"""One process at a time trains in a run directory: the file `run.lock` there, which rank 0 holds.

The file says who holds it (host, process, start) and is touched every few seconds. On the same host a holder is alive
if its process is; the start of the process tells a reused number. Elsewhere (another host, or a container, which has
process numbers of its own) the file is watched until it is touched or has not been for a while: no clocks of two
machines are compared, and a job that was requeued onto another node waits that long once. Kernel locks (`flock`) are
not used, because shared file systems promise them on some mounts only, and in silence.

A lock is taken over by renaming it away and looking at what was renamed, so of two processes that both find a dead
holder's lock one gets it. A holder that was stopped for so long that it lost its lock finds out before it commits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from dla_train.checkpoint.errors import DamagedError, RunDirectoryError
from dla_train.checkpoint.manifest import parse_json, read_small

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
TOUCH_SECONDS = 10.0
STALE_SECONDS = 90.0
"""How long a lock of another host must lie untouched, while it is watched, to be taken over."""
LOOK_SECONDS = 1.0


class RunLock:
    """The lock of one run directory, held from construction until `release`."""

    def __init__(self, run_dir: Path) -> None:
        """Takes the lock, waiting up to STALE_SECONDS for a holder on another host to give a sign of life.

        Raises RunDirectoryError if another process holds it, OSError if the file cannot be written.
        """
        self.path = run_dir / LOCK_FILE
        self._text = json.dumps(process_record(os.getpid()) | {"token": uuid.uuid4().hex})
        self._released = threading.Event()
        while not self._create():
            self._remove_dead_holder()
        threading.Thread(target=self._touch, name="run lock", daemon=True).start()

    def check(self) -> None:
        """Raise RunDirectoryError if another process took the lock over."""
        if not self._is_ours():
            raise RunDirectoryError(
                f"{self.path} is no longer this process's: another one took the run over while this one did not "
                "answer; nothing more is saved here"
            )

    def release(self) -> None:
        """Give the lock back; one that another process took over is left alone."""
        self._released.set()
        if self._is_ours():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Whether the lock file is now ours."""
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(self._text)
        except FileExistsError:
            return False
        return True

    def _remove_dead_holder(self) -> None:
        """Raise RunDirectoryError if the holder lives; otherwise rename its lock away, unless another was faster."""
        try:
            seen = read_small(self.path)
        except DamagedError:  # given back just now
            if os.path.lexists(self.path) and not self.path.is_file():
                raise RunDirectoryError(f"{self.path} is no plain file; remove it") from None
            return
        if _alive(self.path, seen):
            raise RunDirectoryError(
                f"run_dir={self.path.parent} is being trained by {_name(_read(self.path, seen))}; wait for it, "
                f"stop it, or choose another run_dir. (If no such process exists, remove {self.path})"
            )
        away = self.path.with_name(f"{LOCK_FILE}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(away)
            if away.read_bytes() != seen:  # the lock of a third process, which was faster: give it back
                with contextlib.suppress(OSError):  # if that fails, its holder finds out before it saves
                    os.link(away, self.path)
            away.unlink()

    def _is_ours(self) -> bool:
        try:
            return self.path.read_text(encoding="utf-8") == self._text
        except (OSError, UnicodeDecodeError):
            return False

    def _touch(self) -> None:
        while not self._released.wait(TOUCH_SECONDS):
            if self._is_ours():
                with contextlib.suppress(OSError):
                    os.utime(self.path)


def process_record(pid: int) -> dict[str, Any]:
    """What names a process of this host for good: `process_lives` tells whether it still runs."""
    return {"host": platform.node(), "processes": _processes(), "pid": pid, "started": _started(pid)}


def process_lives(record: dict[str, Any]) -> bool | None:
    """Whether the process of a `process_record` runs; None where that cannot be told from here (another host)."""
    if not record or (record.get("host"), record.get("processes")) != (platform.node(), _processes()):
        return None
    pid, started = record.get("pid"), record.get("started")
    return isinstance(pid, int) and started is not None and _started(pid) == started


def seems_held(run_dir: Path) -> bool:
    """Whether a process trains in `run_dir`, at a glance: nothing is waited for or changed.

    A lock of another host counts while it is younger than STALE_SECONDS by this host's clock.
    """
    path = run_dir / LOCK_FILE
    try:
        lives = process_lives(_read(path, read_small(path)))
        return path.stat().st_mtime > time.time() - STALE_SECONDS if lives is None else lives
    except (DamagedError, OSError):
        return False


def _alive(path: Path, seen: bytes) -> bool:
    """Whether the holder named in the lock's content `seen` is at work."""
    holder = _read(path, seen)
    lives = process_lives(holder)
    if lives is not None:
        return lives
    logger.info("watching %s of %s for up to %.0f s for a sign of life", path, _name(holder), STALE_SECONDS)
    first, until = _touched(path), time.monotonic() + STALE_SECONDS
    while time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
        now = _touched(path)
        if now != first:
            return now is not None
    return False


def _touched(path: Path) -> int | None:
    """When the lock was touched, in its file system's nanoseconds; opening it makes network file systems look."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _processes() -> str:
    """What tells this host's process numbers from those of a container or of the host before its last start."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):
        return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str | None:
    """When a process of this host began, in whatever unit the system counts; None if there is none."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie is dead
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return "alive"


def _read(path: Path, content: bytes) -> dict[str, Any]:
    try:
        return parse_json(path, content)
    except DamagedError:
        return {}


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')!s:.20} on {holder.get('host', 'an unknown host')!s:.80}"
