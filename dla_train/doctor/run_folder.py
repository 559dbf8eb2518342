"""run_dir: free for this run, fast enough, and on a disk with room for the checkpoints that will lie there at once.

Nothing is left behind: the speed is measured with a file of its own, in run_dir or the nearest folder that exists.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

from dla_train.checkpoint.folders import checkpoints_of, complete_steps
from dla_train.checkpoint.run_directory import find_objection, run_identity
from dla_train.checkpoint.run_lock import LOCK_FILE, seems_held
from dla_train.config import CheckpointConfig, Config
from dla_train.data.loader import DataSources
from dla_train.doctor.findings import FAILED, OK, WARNING, Finding
from dla_train.models.cost import parameter_count

PARAMETER_BYTES = 12
"""Of a checkpoint: float32 weights and two moments."""
PIECE_BYTES = 1 << 22
SPARE = 1.2
"""Room below this many times what is needed is a warning."""


def check_run_folder(config: Config, sources: DataSources | None) -> list[Finding]:
    """Whether the run may begin or go on in run_dir, and whether its checkpoints have room there."""
    run_dir = Path(config.run_dir)
    if seems_held(run_dir):
        lock = f"(If no such process exists, remove {run_dir / LOCK_FILE})"
        mend = f"wait for it, stop it, or choose another run_dir. {lock}"
        return [Finding("run_dir", FAILED, f"run_dir={run_dir} is being trained by another process; {mend}")]
    if sources is not None:
        identity = run_identity(config, sources.train.fingerprint, sources.tokenizer.fingerprint)
        if problem := find_objection(config, identity):
            return [Finding("run_dir", FAILED, problem)]
    folder = _existing(run_dir)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        mend = "give this user the right to, or choose another run_dir"
        return [Finding("run_dir", FAILED, f"{folder} cannot be written; {mend}")]
    steps = complete_steps(checkpoints_of(run_dir))
    state = f"goes on after step {steps[-1]}" if steps else "begins"
    return [Finding("run_dir", OK, f"the run {state} in {run_dir}"), _room(config, folder)]


def check_disk(config: Config, size_bytes: int) -> Finding:
    """Write a file of `size_bytes`, flushed, and read it back; what that says of a checkpoint's time."""
    folder = _existing(Path(config.run_dir))
    path = folder / f".dla-doctor.{uuid.uuid4().hex}"
    try:
        written, read = _speed(path, size_bytes)
    except OSError as error:
        mend = "free some room or lift the limit there, or choose another run_dir"
        return Finding("disk", FAILED, f"{size_bytes / 1e6:.0f} MB cannot be written to {folder}: {error}; {mend}")
    finally:
        path.unlink(missing_ok=True)
    size = checkpoint_bytes(config)
    seconds = size / written
    speeds = f"{written / 1e6:,.0f} MB/s written, {read / 1e6:,.0f} MB/s read"
    what = f"{speeds}; a checkpoint of {_gb(size)} takes {seconds:,.1f} s"
    limit = 60 * config.resilience.checkpoint_minutes
    if limit and seconds > limit / 2:
        mend = "use a faster file system or raise resilience.checkpoint_minutes"
        return Finding("disk", WARNING, f"{what}, near its limit of {limit:,.0f} s; {mend}")
    return Finding("disk", OK, what)


def checkpoint_bytes(config: Config) -> int:
    """Bytes of one checkpoint's tensors."""
    return PARAMETER_BYTES * parameter_count(config.model, config.memory)


def checkpoints_kept(checkpoint: CheckpointConfig, steps: int) -> int:
    """The most checkpoints that lie in run_dir at once: those that are kept, and the one being written."""
    interval = checkpoint.interval_steps or steps
    saves = -(-steps // interval)
    if not checkpoint.keep_last:
        return saves
    for_good = steps // checkpoint.keep_every_steps if checkpoint.keep_every_steps else 0
    return min(saves, checkpoint.keep_last + for_good + 1)


def _room(config: Config, folder: Path) -> Finding:
    size, kept = checkpoint_bytes(config), checkpoints_kept(config.checkpoint, config.train.steps)
    there = sum(path.stat().st_size for path in checkpoints_of(config.run_dir).glob("step_*/tensors/*"))
    need, free = max(size * kept - there, size), shutil.disk_usage(folder).free
    what = f"{_gb(free)} free in {folder}; {kept} checkpoint(s) of {_gb(size)} need {_gb(need)} more"
    mend = "free some room, set checkpoint.keep_last or keep_every_steps to keep fewer, or choose another run_dir"
    if free < need:
        return Finding("room", FAILED, f"{what}; {mend}")
    if free < SPARE * need:
        return Finding("room", WARNING, f"{what}, which leaves little; {mend}")
    return Finding("room", OK, what)


def _speed(path: Path, size_bytes: int) -> tuple[float, float]:
    """(written, read) bytes a second. Raises OSError."""
    piece, count = os.urandom(min(PIECE_BYTES, size_bytes)), max(size_bytes // PIECE_BYTES, 1)
    with open(path, "wb", buffering=0) as file:
        began = time.perf_counter()
        for _ in range(count):
            if file.write(piece) != len(piece):
                raise OSError("the file ends short of its size: a limit, or a full disk")
        os.fsync(file.fileno())
        written = time.perf_counter() - began
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # else the kernel's own copy is read
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        while file.read(PIECE_BYTES):
            pass
        read = time.perf_counter() - began
    size = len(piece) * count
    return size / written, size / read


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
