"""The program `dla-checkpoint`: look at the checkpoints of a run, check every byte of them, delete old ones.

Reads alone, but for `prune`, which never deletes the newest complete checkpoint nor anything that is being written, so
it may be used while the run goes on. Exit code 0: all is well; 1: something is damaged; 2: a mistake of the caller.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dla_train.checkpoint.errors import CheckpointError
from dla_train.checkpoint.folders import (
    Found,
    checkpoint_folder,
    checkpoints_of,
    find_checkpoints,
    folders_set_aside,
    outdated_steps,
    remove_checkpoint,
)
from dla_train.checkpoint.manifest import MARKER
from dla_train.checkpoint.stored import StoredCheckpoint, open_step
from dla_train.text_tables import aligned

_EXAMPLES = """examples:
  dla-checkpoint list runs/my-run
  dla-checkpoint inspect runs/my-run --step 2000 --tensors
  dla-checkpoint verify runs/my-run                                    # exit code 1 names what is damaged
  dla-checkpoint prune runs/my-run --keep-last 2 --keep-every 10000 --dry-run
"""


def main(arguments: list[str] | None = None) -> None:
    """Console entry."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        sys.exit(command(options))
    except (CheckpointError, OSError) as error:
        print(f"dla-checkpoint: error: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dla-checkpoint",
        description="Look after the checkpoints of a run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("run", type=Path, help="run folder (the one that holds checkpoints/)")
        added.set_defaults(command=command)
        return added

    add("list", _list, "Steps, sizes, ages, and which are complete. Hashes nothing.")
    inspect = add("inspect", _inspect, "What one checkpoint holds.")
    inspect.add_argument("--step", type=int, help="its step (default: the newest complete one)")
    inspect.add_argument("--tensors", action="store_true", help="also every tensor with its type and shape")
    verify = add("verify", _verify, "Hash every file and compare; exit code 1 names what is damaged.")
    verify.add_argument("--step", type=int, help="one step (default: all)")
    prune = add("prune", _prune, "Delete old complete checkpoints, never the newest.")
    prune.add_argument("--keep-last", type=_positive, required=True, help="newest complete checkpoints to keep")
    prune.add_argument("--keep-every", type=_positive, default=0, help="also keep the multiples of so many steps")
    prune.add_argument("--damaged", action="store_true", help="also delete those that were set aside as damaged")
    prune.add_argument("--dry-run", action="store_true", help="say what would be deleted, delete nothing")
    return parser


def _list(options: argparse.Namespace) -> int:
    found, aside = _found(options.run), folders_set_aside(checkpoints_of(options.run))
    rows = [(str(one.step), _size(one.folder), _age(one.folder), _state(one.fault)) for one in found]
    rows += [(folder.name, _size(folder), "", "set aside as damaged") for folder in aside]
    print(aligned([("step", "size", "age", "state"), *rows], left=range(4)))
    return 1 if aside or any(one.fault for one in found) else 0


def _inspect(options: argparse.Namespace) -> int:
    checkpoint, step = open_step(options.run, options.step)
    trainer, tensors = checkpoint.trainer(), checkpoint.tensors("model", "optim", "rng")
    shapes = {name: tensors.entry(name)[1] for name in tensors}
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("model/"))
    facts = {
        "step": step,
        "tokens": trainer["data"].get("tokens", "unknown"),
        "size": f"{_gb(checkpoint.manifest.total_bytes)} in {len(checkpoint.manifest.files)} files",
        "tensors": f"{len(shapes)}, of the model {parameters:,} numbers",
        "ranks that wrote it": trainer.get("ranks", "unknown"),
        "versions": ", ".join(f"{name} {version}" for name, version in trainer["versions"].items()),
    }
    facts |= {key: _setting(trainer["config"], key) for key in SHOWN_SETTINGS}
    for name, fact in facts.items():
        print(f"{name:<24} {fact}")
    if options.tensors:
        rows = [(name, tensors.entry(name)[0], str(list(shapes[name]))) for name in shapes]
        print(aligned([("tensor", "type", "shape"), *rows], left=range(3)))
    return 0


SHOWN_SETTINGS = (
    "name",
    "model.name",
    "model.backbone",
    "memory.policy",
    "data.context_tokens",
    "train.steps",
    "train.global_batch_rows",
    "train.dtype",
    "optim.lr",
    "seed",
)
"""Settings of the run that `inspect` shows."""


def _verify(options: argparse.Namespace) -> int:
    found = _found(options.run)
    chosen = [one for one in found if options.step in (None, one.step)]
    if not chosen:
        there = f" of step {options.step}; choose from {', '.join(str(one.step) for one in found)}" if found else ""
        raise CheckpointError(f"{checkpoints_of(options.run)} holds no complete checkpoint{there}")
    damaged = 0
    for one in chosen:
        fault = _check(one)
        print(f"step {one.step}: {_state(fault)}")
        damaged += fault is not None
    return 1 if damaged else 0


def _check(found: Found) -> CheckpointError | None:
    """Hash one checkpoint, with a progress bar on standard error."""
    try:
        checkpoint = StoredCheckpoint(found.folder, found.step)
        total = checkpoint.manifest.total_bytes
        with tqdm(total=total, unit="B", unit_scale=True, desc=found.folder.name, leave=False, delay=1) as bar:
            checkpoint.verify(progress=bar.update)
        checkpoint.trainer()
        checkpoint.tensors("model", "optim", "rng")
    except CheckpointError as error:
        return error
    return found.fault


def _prune(options: argparse.Namespace) -> int:
    root = checkpoints_of(options.run)
    steps = [one.step for one in _found(options.run) if one.fault is None]
    folders = [checkpoint_folder(root, step) for step in outdated_steps(steps, options.keep_last, options.keep_every)]
    aside = folders_set_aside(root) if options.damaged else []
    verb = "would delete" if options.dry_run else "deleted"
    for folder in [*folders, *aside]:
        size = _size(folder)
        if not options.dry_run:
            (shutil.rmtree if folder in aside else remove_checkpoint)(folder)
        print(f"{verb} {folder} ({size})")
    if not folders and not aside:
        print("nothing to delete")
    return 0


def _found(run: Path) -> list[Found]:
    """The folders with a marker. Raises CheckpointError where the run has no folder of checkpoints."""
    if not checkpoints_of(run).is_dir():
        raise CheckpointError(f"{run} holds no folder checkpoints; give the run_dir of a run")
    return find_checkpoints(checkpoints_of(run))


def _state(fault: CheckpointError | None) -> str:
    return "complete" if fault is None else f"damaged: {fault}"


def _setting(config: dict[str, Any], key: str) -> str:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "unknown" if value is None else str(value)


def _size(folder: Path) -> str:
    return _gb(sum(path.lstat().st_size for path in folder.rglob("*")))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _age(folder: Path) -> str:
    """How long ago it became complete."""
    minutes = (time.time() - os.lstat(folder / MARKER).st_mtime) / 60
    return (
        f"{minutes:.0f} min"
        if minutes < 120
        else f"{minutes / 60:.0f} h"
        if minutes < 2880
        else f"{minutes / 1440:.0f} d"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


if __name__ == "__main__":
    main()
