"""Folders of checkpoints: when one exists, which ones there are, which go.

A checkpoint is written into `step_XXXXXXXX.tmp`, flushed to the disk, renamed, and only then gets its `COMPLETE` marker
with the size of every file. There is no pointer to the newest one: it is found by looking, so nothing can point at a
half-written folder. A folder without a marker is rubbish from a crash; one whose files do not match it is damaged.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

MARKER = "COMPLETE"
_FOLDER = re.compile(r"step_(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint cannot be used: damaged, absent, or of another model."""


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return root / f"step_{step:08d}"


def partial_folder(root: Path, step: int) -> Path:
    """Where it lies while it is being written."""
    return root / f"step_{step:08d}.tmp"


def complete_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints in `root`, ascending. A damaged one is named in a warning and left out."""
    if not root.is_dir():
        return []
    return sorted(
        int(match[1])
        for folder in root.iterdir()
        if (match := _FOLDER.fullmatch(folder.name)) and (folder / MARKER).is_file() and _matches_marker(folder)
    )


def commit(root: Path, step: int) -> None:
    """Turn the written partial folder of `step` into a complete checkpoint; replaces one of the same step."""
    partial, final = partial_folder(root, step), checkpoint_folder(root, step)
    sizes = {}
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            sizes[path.relative_to(partial).as_posix()] = path.stat().st_size
        _flush(path)
    _flush(partial)
    remove_checkpoint(final)
    partial.rename(final)
    _flush(root)
    write_atomically(final / MARKER, json.dumps({"step": step, "files": sizes}, indent=1))


def remove_incomplete(root: Path) -> list[str]:
    """Delete what a crash left: partial folders and folders without a marker. Returns their names."""
    if not root.is_dir():
        return []
    removed = []
    for folder in sorted(root.glob("step_*")):
        if folder.is_dir() and not (folder / MARKER).is_file():
            shutil.rmtree(folder)
            removed.append(folder.name)
    return removed


def remove_old(root: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` complete checkpoints; 0 keeps all."""
    for step in complete_steps(root)[:-keep_last] if keep_last else []:
        remove_checkpoint(checkpoint_folder(root, step))


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, marker first, so that a crash half-way leaves rubbish and no damaged checkpoint."""
    if folder.is_dir():
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, also after a crash."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


def _matches_marker(folder: Path) -> bool:
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    for name, size in marker["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            logger.warning(
                "checkpoint %s is damaged: %s is not the %d bytes written; it is ignored", folder, name, size
            )
            return False
    return True


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
