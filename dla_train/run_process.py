"""A run as a process of its own, for programs that start runs: its command, its environment, and waiting for its end.

`dla-sweep` watches such processes side by side; a point of Hydra's multirun (multirun.py) and the quickstart each wait
for one.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

_LAUNCHED_BY_ANOTHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PointError(RuntimeError):
    """A point of a multirun has failed."""


def command(words: Sequence[str], ranks: int) -> list[str]:
    """The process of a run: dla-train itself, or torchrun with signals handed on as in launch/torchrun.sh."""
    if ranks == 1:
        return [sys.executable, "-m", "dla_train.train", *words]
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", signals]
    return [*torchrun, "-m", "dla_train.train", *words]


def quoted(value: str) -> str:
    """A string as a value of Hydra's grammar."""
    if re.fullmatch(r"[\w./+-]+", value, re.ASCII):  # other letters Hydra reads between quotes alone
        return value
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), value)
    return f"'{escaped}'"


def environment() -> dict[str, str]:
    """This process's variables without those that make it a rank."""
    return {key: value for key, value in os.environ.items() if key not in _LAUNCHED_BY_ANOTHER}


def run_to_end(words: Sequence[str], ranks: int, run_dir: str) -> None:
    """Train a point in a process of its own, as `exit_code` does. Raises PointError if it does not finish."""
    code = exit_code(words, ranks)
    if code:
        raise PointError(f"{run_dir} ended with exit code {code}")


def exit_code(words: Sequence[str], ranks: int) -> int:
    """Train in a process of its own; how that ended.

    SIGTERM, SIGINT and SIGUSR1 are handed on; the run is saved, and this process ends with the run's exit code, so that
    nothing that would follow begins.
    """
    asked: list[int] = []
    # SIGUSR2 is how submitit hears of a time limit; SLURM sends it to every process, and it would kill the run
    shell = ["sh", "-c", 'trap "" USR2; exec "$@"', "sh"]
    process = subprocess.Popen([*shell, *command(words, ranks)], env=environment(), start_new_session=True)

    def hand_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        sys.exit(code if code >= 0 else 128 - code)
    return code
