"""How a point's run is started, found again and stopped: on this machine, one process or one torchrun each.

`Launcher` and `Job` are all that runner.py knows of it; a batch system is another launcher, whose `adopt` looks its
job up by what `start` left in the point's folder. Here that is the process: the shell that becomes the run waits until
its number is written down, so a sweep that is killed at any moment either left a point that it finds again, or no
process. Points are left alone by signals of the terminal; they are stopped one by one, with SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dla_train.checkpoint.run_lock import process_lives, process_record, seems_held
from dla_train.config import ConfigError
from dla_train.durable import write_atomically
from dla_train.parallel.cores import available_cores
from dla_train.run_process import command, environment

START_FILE, OUTPUT_FILE = "start.json", "output.log"
START_LINE = "== dla-sweep starts the run\n"
"""Stands in the output before each start."""
SAVE_SECONDS = 300
"""What a step and a checkpoint may take before torchrun kills its processes."""


class Job(Protocol):
    """A point's run at work."""

    def running(self) -> bool:
        """Whether it has not ended."""

    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None where that is not known."""

    def stop(self) -> None:
        """Ask it to save and end; once is enough."""


class Launcher(Protocol):
    """Where runs are started."""

    def free(self) -> int:
        """How many more may be started now."""

    def start(self, run_dir: Path, overrides: Sequence[str]) -> Job:
        """Start the run of a point in its folder."""

    def adopt(self, run_dir: Path) -> Job | None:
        """The job that an earlier sweep started there and that still runs; ConfigError if it is out of reach."""

    def release(self, job: Job) -> None:
        """Its place is free: the job has ended."""


@dataclass
class LocalJob:
    """A process of this machine; not always a child of this one."""

    record: dict[str, Any]
    """Its process_record."""
    slot: int
    process: subprocess.Popen[bytes] | None = None
    """The child; None if an earlier sweep started it."""

    def running(self) -> bool:
        if self.process is not None:
            return self.process.poll() is None
        return bool(process_lives(self.record))

    def exit_code(self) -> int | None:
        return None if self.process is None else self.process.returncode

    def stop(self) -> None:
        if self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.record["pid"], signal.SIGTERM)


class LocalLauncher:
    """Points side by side on this machine; each slot has its share of the cores, and devices of its own."""

    def __init__(self, environments: Sequence[Mapping[str, str]], ranks: int) -> None:
        """`environments`: one for each point that may run at a time (`slot_environments`)."""
        self._environments = environments
        self._ranks = ranks
        self._taken: set[int] = set()

    def free(self) -> int:
        return len(self._environments) - len(self._taken)

    def start(self, run_dir: Path, overrides: Sequence[str]) -> Job:
        slot = min(set(range(len(self._environments))) - self._taken)
        waits = 'read go && exec "$@" < /dev/null'
        with open(run_dir / OUTPUT_FILE, "ab") as output:
            output.write(START_LINE.encode())
            output.flush()
            process = subprocess.Popen(
                ["sh", "-c", waits, "sh", *command(overrides, self._ranks)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**environment(), **self._environments[slot]},
                start_new_session=True,
            )
        record = process_record(process.pid)
        write_atomically(run_dir / START_FILE, json.dumps(record | {"slot": slot}))
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed already; running() will tell
            process.stdin.write(b"go\n")
            process.stdin.close()
        self._taken.add(slot)
        return LocalJob(record, slot, process)

    def adopt(self, run_dir: Path) -> Job | None:
        record = read_start(run_dir)
        if not record:
            return None
        lives = process_lives(record)
        if lives is None and seems_held(run_dir):
            raise ConfigError(f"{run_dir} is being trained on {record.get('host')}; start the sweep there, or stop it")
        if not lives:
            return None
        self._taken.add(record["slot"])
        return LocalJob(record, record["slot"])

    def release(self, job: Job) -> None:
        assert isinstance(job, LocalJob)
        self._taken.discard(job.slot)


def read_start(run_dir: Path) -> dict[str, Any]:
    """What the last start of a point wrote down; {} where there was none."""
    path = run_dir / START_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def slot_environments(parallel: int, ranks: int, cores: int, devices: Sequence[str]) -> list[dict[str, str]]:
    """For each point at a time, the variables that give its `ranks` processes their share of the machine.

    parallel: points at a time, 0 for as many as there is room. Raises ConfigError where devices do not suffice.
    """
    room = (len(devices) if devices else cores) // ranks
    if devices and max(parallel, 1) > room:
        raise ConfigError(
            f"sweep.parallel={max(parallel, 1)} points of sweep.ranks={ranks} need {max(parallel, 1) * ranks} devices, "
            f"and there are {len(devices)}; lower one of them, or set train.device=cpu"
        )
    count = parallel or max(room, 1)
    threads = max(cores // (count * ranks), 1)
    common = {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_SECONDS)}
    if not devices:
        return [dict(common) for _ in range(count)]
    own = [",".join(devices[slot * ranks : (slot + 1) * ranks]) for slot in range(count)]
    return [common | {"CUDA_VISIBLE_DEVICES": names} for names in own]


def local_launcher(parallel: int, ranks: int, *, on_cpu: bool) -> LocalLauncher:
    """A launcher on this machine's cores and, unless runs stay on the CPU, its devices. Raises ConfigError."""
    devices: list[str] = []
    if not on_cpu and torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    return LocalLauncher(slot_environments(parallel, ranks, available_cores(), devices), ranks)
