"""Points as jobs of SLURM, one each, by the batch script of `dla-launch`: warned, saved and queued again as any run.

One job a point: the sweep starts points one by one (a search proposes them so), and finds each again by the number in
its folder; also the tasks of an array (slurm_array.py). How a job ended is told by what its run left; SLURM is asked
only if it is still there.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dla_train.config import ConfigError
from dla_train.durable import write_atomically
from dla_train.launch.settings import LauncherConfig
from dla_train.launch.slurm import STAY_FILE, SubmitError, job_script, submit, try_submission
from dla_train.sweep.launchers import OUTPUT_FILE, START_FILE, START_LINE, Job, read_start

JOB_FILE = "job.sh"
ARRAYS_FOLDER, NUMBER_FILE = "arrays", "number"
"""In the sweep's folder, and in the folder there of each array: SLURM's number of it."""
LOOK_SECONDS = 3.0
"""How often the queue is asked, for all points at once."""
UNBOUNDED = 10_000
"""Points in the queue with sweep.parallel=0; the cluster decides how many of them run."""


@dataclass
class Queue:
    """What squeue says of this user's jobs."""

    _seen: float = -1e9
    _jobs: frozenset[str] = frozenset()

    def holds(self, number: str) -> bool:
        """Whether the job waits, runs or is being ended. A controller that does not answer has not ended it."""
        if time.monotonic() > self._seen + LOOK_SECONDS:
            jobs = _queued()
            if jobs is None:
                return True
            self._seen, self._jobs = time.monotonic(), jobs
        return number in self._jobs

    def forget(self) -> None:
        """Ask again: a job was submitted."""
        self._seen = -1e9


def _queued() -> frozenset[str] | None:
    """Numbers of this user's jobs, tasks of arrays one by one; None where SLURM does not answer."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    asked = subprocess.run(command, capture_output=True, text=True)
    return None if asked.returncode else frozenset(asked.stdout.split())


def job_of(run_dir: Path) -> str | None:
    """Number of the job that was queued last for a point, `123`, or `123_4` of an array's task; None where none was."""
    record = read_start(run_dir)
    if "slurm_array" not in record:
        return record.get("slurm_job")
    path = run_dir.parents[1] / ARRAYS_FOLDER / record["slurm_array"] / NUMBER_FILE
    return f"{path.read_text(encoding='utf-8')}_{record['task']}" if path.is_file() else None


@dataclass
class SlurmJob:
    """A job in the queue or at work."""

    number: str
    run_dir: Path
    queue: Queue
    ended: bool = False

    def running(self) -> bool:
        self.ended = self.ended or not self.queue.holds(self.number)
        return not self.ended

    def exit_code(self) -> int | None:
        """Of the batch script, while the controller remembers it."""
        match = re.search(r" ExitCode=(\d+):(\d+)", self._shown())
        return None if match is None else -int(match[2]) if int(match[2]) else int(match[1])

    def stop(self) -> None:
        """Save and end, and stay ended; a job that has not begun leaves the queue."""
        (self.run_dir / STAY_FILE).touch()
        begun = "JobState=PENDING" not in self._shown()
        how = ["--signal=USR1", "--batch"] if begun else []
        subprocess.run(["scancel", *how, self.number], capture_output=True)

    def _shown(self) -> str:
        command = ["scontrol", "show", "job", self.number, "--oneliner"]
        return subprocess.run(command, capture_output=True, text=True).stdout


@dataclass
class SlurmLauncher:
    """Submits points; `parallel` of them at a time, 0 for all."""

    settings: LauncherConfig
    name: str
    """Of the sweep, for the jobs' names."""
    parallel: int
    _queue: Queue = field(default_factory=Queue)
    _taken: int = 0

    def free(self) -> int:
        return (self.parallel or UNBOUNDED) - self._taken

    def start(self, run_dir: Path, overrides: Sequence[str]) -> Job:
        output = run_dir.resolve() / OUTPUT_FILE
        with open(output, "a", encoding="utf-8") as file:
            file.write(START_LINE)
        text = job_script(self.settings, f"{self.name}-{run_dir.name}", run_dir, overrides, sys.executable, output)
        (run_dir / JOB_FILE).write_text(text, encoding="utf-8")
        number = submit(run_dir / JOB_FILE)
        write_atomically(run_dir / START_FILE, json.dumps({"slurm_job": number}))
        self._queue.forget()
        self._taken += 1
        return SlurmJob(number, run_dir, self._queue)

    def adopt(self, run_dir: Path) -> Job | None:
        number = job_of(run_dir)
        if number is None or not self._queue.holds(number):
            return None
        self._taken += 1
        return SlurmJob(number, run_dir, self._queue)

    def release(self, job: Job) -> None:
        self._taken -= 1


def slurm_launcher(settings: LauncherConfig, name: str, parallel: int) -> SlurmLauncher:
    """The launcher of the sweep `name`. Raises ConfigError where the cluster would refuse its points."""
    try:
        try_submission(job_script(settings, name, Path(), [], sys.executable, Path("/dev/null")))
    except SubmitError as error:
        raise ConfigError(str(error)) from error
    return SlurmLauncher(settings, name, parallel)
