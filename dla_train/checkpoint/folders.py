"""Folders of checkpoints: when one exists, which ones there are, which go.

A checkpoint is written into `step_XXXXXXXX.tmp`, flushed to the disk, renamed, and only then gets its `COMPLETE`
marker. There is no pointer to the newest one: it is found by looking, so nothing can point at a half-written folder. A
folder without a marker is rubbish from a crash; one that does not match its manifest is damaged: it is never deleted
here, but set aside under a name that does not count.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from dla_train.checkpoint.errors import CheckpointError
from dla_train.checkpoint.manifest import MARKER, FileRecord, read_manifest, write_manifest
from dla_train.durable import flush_folder, write_atomically

_FOLDER = re.compile(r"step_(\d{8,18})")
_LEFT_BY_A_CRASH = re.compile(r"step_\d{8,18}(\.tmp|\.replaced)?")

_SET_ASIDE = re.compile(r"step_\d{8,18}\.(damaged|rewound)\d*")


@dataclass(frozen=True)
class Found:
    """A folder with a completion marker."""

    step: int
    folder: Path
    fault: CheckpointError | None
    """Why it cannot be used, by its manifest and the sizes of its files; None if nothing speaks against it."""


def checkpoints_of(run_dir: str | Path) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(run_dir) / "checkpoints"


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return root / f"step_{step:08d}"


def partial_folder(root: Path, step: int) -> Path:
    """Where it lies while it is being written."""
    return root / f"step_{step:08d}.tmp"


def find_checkpoints(root: Path) -> list[Found]:
    """Every folder in `root` that has a completion marker, by step. Contents are not hashed.

    Raises CheckpointError where `root` may not be read.
    """
    try:
        names = [path.name for path in root.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read: {error.strerror}; mend that, or check run_dir") from error
    steps = {int(match[1]) for name in names if (match := _FOLDER.fullmatch(name))}
    folders = [(step, checkpoint_folder(root, step)) for step in sorted(steps)]
    return [Found(step, folder, _fault(folder, step)) for step, folder in folders if os.path.lexists(folder / MARKER)]


def complete_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints in `root`, ascending; damaged ones are left out."""
    return [found.step for found in find_checkpoints(root) if found.fault is None]


def commit(root: Path, step: int, files: dict[str, FileRecord]) -> None:
    """Turn the partial folder of `step`, whose `files` are on the disk, into a complete checkpoint.

    One of the same step, if there is one, waits under another name until the new one is complete.
    """
    partial, final = partial_folder(root, step), checkpoint_folder(root, step)
    marker = write_manifest(partial, step, files)
    for folder in sorted({(partial / name).parent for name in files}):
        flush_folder(folder)
    flush_folder(partial)
    replaced = final.with_name(final.name + ".replaced")
    if final.is_dir():
        final.rename(replaced)
    partial.rename(final)
    flush_folder(root)
    write_atomically(final / MARKER, marker)
    if replaced.is_dir():
        shutil.rmtree(replaced)


def put_back_replaced(root: Path) -> None:
    """Give a checkpoint its name back that a crash left without its successor. Not while a save is being written."""
    for replaced in sorted(root.glob("step_*.replaced")):
        final = replaced.with_suffix("")
        if not os.path.lexists(final / MARKER):
            if final.is_dir():
                shutil.rmtree(final)
            replaced.rename(final)


def remove_incomplete(root: Path) -> list[str]:
    """Delete what a crash left: partial folders and folders without a marker. Returns their names.

    Not while a save is being written: its folder looks the same.
    """
    if not root.is_dir():
        return []
    put_back_replaced(root)
    removed = []
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.is_symlink() or not _LEFT_BY_A_CRASH.fullmatch(folder.name):
            continue
        if folder.suffix or not os.path.lexists(folder / MARKER):
            shutil.rmtree(folder)
            removed.append(folder.name)
    return removed


def outdated_steps(steps: list[int], keep_last: int, keep_every_steps: int) -> list[int]:
    """Which of the complete `steps` (ascending) may go: never the newest, nor a multiple of `keep_every_steps`.

    keep_last: newest to keep, 0 keeps all.
    """
    older = steps[:-keep_last] if keep_last else []
    return [step for step in older if not keep_every_steps or step % keep_every_steps]


def remove_old(root: Path, newest: int, keep_last: int, keep_every_steps: int) -> list[int]:
    """Delete complete checkpoints that are not to be kept, `newest` being the one just written. Returns their steps.

    Later ones than `newest`, which only an unusual history leaves, do not count and stay.
    """
    steps = [step for step in complete_steps(root) if step <= newest]
    removed = outdated_steps(steps, keep_last, keep_every_steps)
    for step in removed:
        remove_checkpoint(checkpoint_folder(root, step))
    return removed


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, marker first, so that a crash half-way leaves rubbish and no damaged checkpoint."""
    (folder / MARKER).unlink(missing_ok=True)
    flush_folder(folder)
    shutil.rmtree(folder)


def set_aside(folder: Path, why: str = "damaged") -> Path:
    """Rename a checkpoint that is `damaged`, or of steps that were `rewound`, so that it no longer counts.

    Nothing of it is lost. Returns its new path.
    """
    aside = folder.with_name(f"{folder.name}.{why}")
    for number in range(2, 1000):
        if not os.path.lexists(aside):
            break
        aside = folder.with_name(f"{folder.name}.{why}{number}")
    folder.rename(aside)
    return aside


def folders_set_aside(root: Path) -> list[Path]:
    """The folders that `set_aside` renamed."""
    return sorted(path for path in root.iterdir() if _SET_ASIDE.fullmatch(path.name))


def _fault(folder: Path, step: int) -> CheckpointError | None:
    try:
        read_manifest(folder, step)
    except CheckpointError as error:
        return error
    return None
