"""How a training process ends, for launchers: its exit code, and `status.json` in the run directory.

torchrun answers 1 whatever its workers return, and whoever kills a job sees no code at all; the file is there in any
case. `running` is what a process that was killed leaves behind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dla_train.durable import write_atomically

# 2 is a mistake in the configuration, the data or the run directory (config.MISTAKE): the same command fails again

FINISHED = 0
"""The last step is done (`train.steps` or `train.stop_at_step`) and saved."""
DIVERGED = 3
"""Numbers that are not finite, beyond what `resilience` puts up with: a restart would meet them again."""
HUNG = 4
"""A phase took longer than its limit: a restart goes on from the last checkpoint."""
STOPPED = 75
"""A signal asked for it and everything is saved: the same command goes on (EX_TEMPFAIL of sysexits)."""

STATUS_FILE = "status.json"


def write_status(run_dir: Path, state: str, step: int, code: int | None, reason: str = "") -> None:
    """Say how the run stands: `running`, `finished`, `stopped` or `diverged`. Killed or hung ones stay `running`."""
    status = {"state": state, "step": step, "exit_code": code, "reason": reason}
    write_atomically(run_dir / STATUS_FILE, json.dumps(status, indent=1))


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What `write_status` last wrote; None where no run began."""
    path = run_dir / STATUS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
