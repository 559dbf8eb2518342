"""The command `dla-launch`: `dla-launch launcher=slurm launcher.nodes=2 launcher.ranks_per_node=8 experiment=...`.

Composes and checks the run for all its ranks first, so that what a cluster would refuse after hours in the queue is
refused now; then writes what is started into the run directory, and starts it. `--dry-run` prints it instead.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dla_train.config import MISTAKE, Config, ConfigError
from dla_train.config_rules import validate
from dla_train.doctor.command import preflight
from dla_train.doctor.command import split as split_doctor
from dla_train.doctor.findings import OK, failed
from dla_train.doctor.machine import check_devices
from dla_train.hydra_app import compose
from dla_train.launch.environment import environment_here
from dla_train.launch.meeting import MeetingError, meet
from dla_train.launch.record import launch_folder, write_record
from dla_train.launch.settings import PROGRAMS, LauncherConfig, load_launcher, split
from dla_train.launch.slurm import SubmitError, job_script, submit, try_submission
from dla_train.start_clock import process_began, starting

USAGE = """usage: dla-launch [--dry-run] [launcher=torchrun|slurm|FILE.yaml] [launcher.key=value ...] [run's settings]

  dla-launch experiment=quickstart launcher.ranks_per_node=2
  dla-launch launcher.nodes=2 launcher.endpoint=host0:29500 launcher.ranks_per_node=8 experiment=...   # on both
  dla-launch launcher=slurm launcher.nodes=8 launcher.ranks_per_node=8 launcher.partition=gpu experiment=...
"""


class LaunchError(RuntimeError):
    """The run cannot be started here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: of torchrun, 0 after a submission, 2 after a mistake."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or {"-h", "--help"} & set(given):
        print(USAGE, end="")
        return 0
    dry = "--dry-run" in given
    try:
        return launch([argument for argument in given if argument != "--dry-run"], dry=dry)
    except (ConfigError, LaunchError, MeetingError, SubmitError, OSError) as error:
        print(f"dla-launch: error: {error}", file=sys.stderr)
        return MISTAKE


def launch(arguments: Sequence[str], *, dry: bool) -> int:
    """Start the run, or print what would be started."""
    own, run = split(arguments)
    launcher = load_launcher(own)
    doctor = launcher.program == "doctor"
    config = compose(split_doctor(run)[1] if doctor else list(run))
    if launcher.kind == "torchrun" and not launcher.ranks_per_node:
        launcher.ranks_per_node = _devices()
    validate(config, world_size=launcher.nodes * launcher.ranks_per_node)
    folder = launch_folder(config)
    if launcher.preflight and not doctor and not dry:
        _check_first(launcher, config)
    if launcher.kind == "slurm":
        return _submit(launcher, config, run, folder, dry=dry)
    return _run_here(launcher, config, run, folder, dry=dry)


def _check_first(launcher: LauncherConfig, config: Config) -> None:
    """Refuse what would fail for a reason that can be seen from here."""
    found = preflight(config, launcher.nodes * launcher.ranks_per_node)
    if launcher.kind == "torchrun":  # a batch system's nodes are not this machine
        found.append(check_devices(config, launcher.ranks_per_node))
    wrong = [finding.line() for finding in found if finding.state != OK]
    if failed(found):
        told = "\n".join(wrong)
        raise LaunchError(f"nothing is started:\n{told}\n(launcher.preflight=false leaves these checks to the run)")
    for line in wrong:
        print(line, file=sys.stderr)


def _run_here(launcher: LauncherConfig, config: Config, run: Sequence[str], folder: Path, *, dry: bool) -> int:
    """torchrun in this process's place, so that signals reach it."""
    restarts = launcher.restarts if launcher.program == "train" else 0
    here = [name for _, name in socket.if_nameindex()]
    if launcher.interface and launcher.interface not in here:
        rule = f"launcher.interface={launcher.interface} is not on this machine"
        raise LaunchError(f"{rule}; choose from {', '.join(here)}, or leave it out")
    meeting = meet(launcher.endpoint) if launcher.nodes > 1 else None
    place = meeting.arguments(launcher.nodes, config.name, launcher.join_seconds) if meeting else ["--standalone"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", *place),
        *(f"--nproc-per-node={launcher.ranks_per_node}", f"--max-restarts={restarts}"),
        *("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "-m", PROGRAMS[launcher.program], *run),
    ]
    environment = (meeting.environment() if meeting else {}) | environment_here(launcher)
    text = f"{' '.join(f'{key}={value}' for key, value in environment.items())} {shlex.join(command)}\n"
    if dry:
        print(text, end="")
        return 0
    # paths of the command line may be relative
    script = f"#!/usr/bin/env bash\ncd {shlex.quote(os.getcwd())} || exit 1\nexec env {text}"
    path = write_record(folder, config, launcher, script, "run.sh")
    print(f"{launcher.ranks_per_node} rank(s) are started by {path}", flush=True)
    if meeting:
        rule = f"{launcher.join_seconds} s (launcher.join_seconds), then torchrun ends with RendezvousTimeoutError"
        mend = "start the same command on all, with the same endpoint"
        print(f"{launcher.nodes} machines meet at {launcher.endpoint}, within {rule}: {mend}", flush=True)
    now = time.time()
    environment |= starting(("dla-launch", process_began() or now), ("torchrun", now))
    os.execve(command[0], command, os.environ | environment)


def _submit(launcher: LauncherConfig, config: Config, run: Sequence[str], folder: Path, *, dry: bool) -> int:
    text = job_script(launcher, config.name, Path(config.run_dir), run, sys.executable, folder / "slurm-%j.log")
    if dry:
        print(text, end="")
        return 0
    try_submission(text)  # before anything is written
    path = write_record(folder, config, launcher, text, "job.sh")
    job = submit(path)
    print(f"job {job} is queued; its log is {folder}/slurm-{job}.log, its state `squeue -j {job}` and status.json")
    return 0


def _devices() -> int:
    """GPUs of this machine, 1 without."""
    import torch

    return max(1, torch.cuda.device_count())


if __name__ == "__main__":
    sys.exit(main())
