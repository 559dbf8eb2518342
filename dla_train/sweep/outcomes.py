"""How a point ended, and what it is worth: read from what its run left, and written down once, in `outcome.json`.

Exit codes are not enough (torchrun answers 1 whatever happens, and an adopted process tells none), so status.json
decides, if this start of the run wrote it.
"""

from __future__ import annotations

import json
import math
import re
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from dla_train.config import MISTAKE, ConfigError
from dla_train.durable import write_atomically
from dla_train.resilience.exit_codes import DIVERGED, HUNG, STATUS_FILE, read_status
from dla_train.sweep.launchers import OUTPUT_FILE, START_FILE, START_LINE
from dla_train.trackers import METRICS_FILE, read_lines

OUTCOME_FILE = "outcome.json"
_TAIL_BYTES = 20_000
_REASON_LENGTH = 400


@dataclass(frozen=True)
class Outcome:
    """How a point ended for good."""

    state: str
    """`finished`, `failed` or `pruned`."""
    step: int
    """Optimizer steps done."""
    value: float | None = None
    """The objective of a finished point."""
    reason: str = ""
    """Why it failed or was pruned."""


def ending(run_dir: Path, exit_code: int | None, status_before: int | None) -> str:
    """How a start of a run ended: `finished`, `stopped`, `failed` (it would fail again) or `died`.

    status_before: `status_stamp` when it was started.
    """
    status = read_status(run_dir) if status_stamp(run_dir) != status_before else None
    state = status["state"] if status else ""
    if state in ("finished", "stopped"):
        return str(state)
    if state == "diverged" or exit_code in (MISTAKE, DIVERGED) or _says_mistake(run_dir):
        return "failed"
    return "died"


def status_stamp(run_dir: Path) -> int | None:
    """What changes whenever a run says how it stands."""
    path = run_dir / STATUS_FILE
    return path.stat().st_mtime_ns if path.is_file() else None


def finished_outcome(run_dir: Path, objective: str) -> Outcome:
    """The outcome of a finished run; one without a finite objective has failed."""
    step = steps_done(run_dir)
    values = [line[objective] for line in read_lines(run_dir / METRICS_FILE) if objective in line]
    if not values:
        return Outcome("failed", step, reason=f"finished without a {objective} in {METRICS_FILE}")
    if not math.isfinite(values[-1]):
        return Outcome("failed", step, reason=f"{objective} is {values[-1]}")
    return Outcome("finished", step, value=float(values[-1]))


def failed_outcome(run_dir: Path, exit_code: int | None, starts: int) -> Outcome:
    """The outcome of a run that failed, with the reason it gave or what can be said of its end."""
    status = read_status(run_dir) or {}
    said = status.get("reason") or last_words(run_dir)
    ended = f"killed by {signal.Signals(-exit_code).name}" if exit_code is not None and exit_code < 0 else ""
    hung = "a phase hung, see hangs/" if exit_code == HUNG else ""
    reason = "; ".join(part for part in (ended, hung, said) if part) or "ended without a word"
    again = f" ({starts} starts)" if starts > 1 else ""
    return Outcome("failed", steps_done(run_dir), reason=reason[:_REASON_LENGTH] + again)


def steps_done(run_dir: Path) -> int:
    """Optimizer steps of a run, by its newest line or what it said when it ended."""
    status = read_status(run_dir) or {}
    lines = read_lines(run_dir / METRICS_FILE)
    return max(int(status.get("step", 0)), int(lines[-1]["step"]) if lines else 0)


def last_words(run_dir: Path) -> str:
    """The error that a run's output ends with: the program's own sentence, else an exception's last line."""
    text = _tail(run_dir)
    told = re.findall(r"^dla-train: error: (.*)$", text, re.MULTILINE)
    raised = re.findall(r"^(?:\[rank\d+\]: *)?([\w.]+(?:Error|Exception|Interrupt)\b.*)$", text, re.MULTILINE)
    found = told or raised
    return str(found[-1]).strip() if found else ""


def read_outcome(run_dir: Path) -> Outcome | None:
    """How the point ended; None if it has not."""
    path = run_dir / OUTCOME_FILE
    if not path.is_file():
        return None
    try:
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it, and the sweep looks at the run again") from error


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    """Write down how a point ended."""
    write_atomically(run_dir / OUTCOME_FILE, json.dumps(asdict(outcome), indent=1))


def forget_outcome(run_dir: Path) -> None:
    """Let a failed point be started again, and its starts be counted anew."""
    (run_dir / START_FILE).unlink(missing_ok=True)
    (run_dir / OUTCOME_FILE).unlink(missing_ok=True)


def began(run_dir: Path) -> bool:
    """Whether the newest start printed anything; a job that was taken out of the queue has not."""
    return bool(_tail(run_dir).strip())


def _says_mistake(run_dir: Path) -> bool:
    """Whether this start ended in a user's mistake, where torchrun hides the exit code."""
    return "dla-train: error: " in _tail(run_dir)


def _tail(run_dir: Path) -> str:
    """The end of the output of the newest start."""
    path = run_dir / OUTPUT_FILE
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        return file.read().decode(errors="replace").rpartition(START_LINE)[2]
