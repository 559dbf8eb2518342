"""The program `dla-runs`: how runs stand, one line each, read from what they leave in their folders.

`status.json` is what a run last said, the lock tells whether a process is still at it; together they tell a run that
works from one that died without a word. Nothing is changed and nothing waited for.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dla_train.checkpoint.errors import CheckpointError
from dla_train.checkpoint.folders import checkpoints_of, complete_steps
from dla_train.checkpoint.run_directory import CONFIG_FILE, RUN_FILE
from dla_train.checkpoint.run_lock import LOCK_FILE, seems_held
from dla_train.resilience.exit_codes import STATUS_FILE, read_status
from dla_train.text_tables import aligned
from dla_train.trackers import METRICS_FILE, read_lines

_EXAMPLES = """examples:
  dla-runs                            # every run below runs/
  dla-runs runs/sweeps/tau_capacity build/quickstart
  dla-runs --json runs | jq '.[] | select(.state == "died") | .folder'
"""
_MARKS = (RUN_FILE, STATUS_FILE, CONFIG_FILE)


@dataclass(frozen=True)
class RunState:
    """How a run stands."""

    folder: str
    state: str
    """`waiting` (never begun), `starting`, `running`, `finished`, `stopped` (goes on), `diverged`, `died` (a process
    that ended without a word; goes on from its checkpoint), or `damaged` (its files cannot be read)."""
    step: int
    steps: int | None
    loss: float | None
    """Training loss of the last line, nats per token."""
    validation_loss: float | None
    """Of the last validation."""
    tokens_per_second: float | None
    checkpoint: int | None
    """Step of the newest complete checkpoint."""
    age_seconds: float | None
    """Since the run last wrote a number or said how it stands."""
    reason: str
    """Why it ended, where it said so."""


def read_run(run_dir: Path) -> RunState:
    """How the run in `run_dir` stands. A file that cannot be read makes it `damaged`; nothing raises."""
    try:
        status, lines = read_status(run_dir) or {}, read_lines(run_dir / METRICS_FILE)
        saved = max(complete_steps(checkpoints_of(run_dir)), default=None)
        steps = _steps(run_dir)
    except (ValueError, OSError, CheckpointError, OmegaConfBaseException, YAMLError) as error:
        reason = str(error).splitlines()[0]
        return RunState(str(run_dir), "damaged", 0, None, None, None, None, None, _age(run_dir), reason)
    written = int(lines[-1]["step"]) if lines else 0
    step = max(int(status.get("step", 0)), written)
    return RunState(
        folder=str(run_dir),
        state=_state(run_dir, status),
        step=step,
        steps=None if steps is None else max(steps, step),  # it was started again with a smaller train.stop_at_step
        loss=_last(lines, "loss"),
        validation_loss=_last(lines, "validation_loss"),
        tokens_per_second=_last(lines, "tokens_per_second"),
        checkpoint=saved,
        age_seconds=_age(run_dir),
        reason=str(status.get("reason") or ""),
    )


def find_runs(folders: Sequence[Path]) -> Iterator[Path]:
    """Every run directory at or under `folders`, in order; what lies inside one is not searched."""
    for folder in folders:
        if any((folder / mark).is_file() for mark in _MARKS):
            yield folder
        elif folder.is_dir():
            yield from find_runs(sorted(child for child in folder.iterdir() if child.is_dir()))


def table(runs: Sequence[RunState]) -> str:
    """The runs as aligned text."""
    head = ("run", "state", "step", "loss", "validation", "tokens/s", "checkpoint", "age", "")
    rows = [head, *map(_row, runs)]
    return aligned(rows, left=(0, 1, len(head) - 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns 0, or 2 where a folder does not exist or nothing was found."""
    parser = argparse.ArgumentParser(
        prog="dla-runs",
        description="How runs stand, one line each.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], help="run folders or what holds them")
    parser.add_argument("--json", action="store_true", help="print JSON; absent and not finite numbers are null")
    options = parser.parse_args(arguments)
    absent = [str(folder) for folder in options.folders if not folder.is_dir()]
    if absent:
        print(f"dla-runs: error: {', '.join(absent)}: no such folder; name folders that hold runs", file=sys.stderr)
        return 2
    runs = [read_run(folder) for folder in find_runs(options.folders)]
    if options.json:
        print(json.dumps([_json(run) for run in runs], indent=1))
    elif runs:
        print(table(runs))
    else:
        print("no runs there")
    return 0


def _json(run: RunState) -> dict[str, Any]:
    values = asdict(run)
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def _state(run_dir: Path, status: dict[str, Any]) -> str:
    said = str(status.get("state", ""))
    if seems_held(run_dir):
        return "running" if said == "running" else "starting"
    if said == "running" or (not said and (run_dir / LOCK_FILE).exists()):
        return "died"
    return said or "waiting"


def _steps(run_dir: Path) -> int | None:
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return None
    loaded = OmegaConf.load(path)
    train = (loaded.get("train") if isinstance(loaded, DictConfig) else None) or {}
    steps = train.get("stop_at_step") or train.get("steps")
    return None if steps is None else int(steps)


def _last(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    return next((float(line[name]) for line in reversed(lines) if name in line), None)


def _age(run_dir: Path) -> float | None:
    files = [run_dir / name for name in (METRICS_FILE, STATUS_FILE)]
    times = [path.stat().st_mtime for path in files if path.is_file()]
    return max(time.time() - max(times), 0.0) if times else None


def _row(run: RunState) -> tuple[str, ...]:
    return (
        run.folder,
        run.state,
        f"{run.step}/{run.steps}" if run.steps else str(run.step),
        _number(run.loss, ".4f"),
        _number(run.validation_loss, ".4f"),
        _number(run.tokens_per_second, ",.0f"),
        _number(run.checkpoint, "d"),
        "-" if run.age_seconds is None else duration(run.age_seconds),
        run.reason,
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best: `42 s`, `7 min`, `3.2 h`, `5.1 d`."""
    for limit, unit, length in ((60, "s", 1), (3600, "min", 60), (86400, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 86400:.1f} d"


if __name__ == "__main__":
    sys.exit(main())
