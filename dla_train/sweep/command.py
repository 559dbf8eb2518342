"""The program `dla-sweep`: many runs of one experiment, and the report on them.

  dla-sweep sweep=tau_capacity experiment=quickstart              # start it; the same command again goes on
  dla-sweep sweep=my.yaml sweep.seeds=[0,1,2] sweep.parallel=4 experiment=... train.steps=500
  dla-sweep sweep=... launcher=slurm launcher.partition=gpu sweep.ranks=8 experiment=...   # a job each, watched
  dla-sweep submit sweep=... launcher=slurm ...                   # all as one job array, and end; again: what is left
  dla-sweep list sweep=learning_rate experiment=...               # check and show the points, start nothing
  dla-sweep resume FOLDER [sweep.parallel=2]                      # go on with the command that started it
  dla-sweep report FOLDER                                         # write its report (also while it runs)
  dla-sweep report FOLDER --to OTHER                              # as Markdown, pictures and report.json, to be kept;
                                                                  # dla-sweep report OTHER makes it again of the last

Words that begin with `sweep` are about the sweep (dla_train/sweep/definition.py), the others are settings of every run.
Exit code 0: every point ended well, or is queued; 1: some failed; 2: a mistake, nothing was started; 75: stopped, and
can go on.
"""

from __future__ import annotations

import json
import logging
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dla_train.checkpoint.errors import RunDirectoryError
from dla_train.checkpoint.run_lock import RunLock, seems_held
from dla_train.config import MISTAKE, Config, ConfigError
from dla_train.durable import write_atomically
from dla_train.launch.settings import LauncherConfig, load_launcher
from dla_train.launch.slurm import SubmitError
from dla_train.parallel.cores import available_cores
from dla_train.resilience.exit_codes import STOPPED
from dla_train.sweep.definition import SweepConfig, check_sweep, read_sweep, sweep_from_dict
from dla_train.sweep.kept import is_kept, open_results
from dla_train.sweep.launchers import Launcher, local_launcher
from dla_train.sweep.outcomes import forget_outcome, read_outcome
from dla_train.sweep.points import (
    Point,
    baseline_settings,
    check_corners,
    check_folder,
    check_points,
    points_of,
    read_points,
    swept_settings,
)
from dla_train.sweep.report import write_report
from dla_train.sweep.results import SWEEP_FILE, read_results
from dla_train.sweep.runner import SweepRun
from dla_train.sweep.slurm_array import check_array, refuse_queued, settle, submit_points
from dla_train.sweep.slurm_launcher import slurm_launcher
from dla_train.sweep.tpe import Study

USE_FILE = "use.json"
"""In the sweep's folder: what its points took of this machine, at the last start."""
FAILED = 1
"""Exit code where points have failed."""


def main() -> None:
    """The console script."""
    logging.basicConfig(format="%(message)s")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Do what the words ask for; returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else MISTAKE
    try:
        if arguments[0] == "report":
            return _report(arguments[1:])
        if arguments[0] == "list":
            return _list(*read_sweep(arguments[1:]))
        if arguments[0] == "submit":
            return submit(*_named_or_stored(arguments[1:]))
        if arguments[0] == "resume":
            return start(*_stored(arguments[1:]))
        return start(*read_sweep(arguments))
    except (ConfigError, RunDirectoryError, SubmitError, OSError) as error:
        print(f"dla-sweep: error: {error}", file=sys.stderr)
        return MISTAKE


def start(sweep: SweepConfig, overrides: Sequence[str]) -> int:
    """Check everything, run what has not been run, write the report. Raises ConfigError before anything is started."""
    points, configs = checked_points(sweep, overrides)
    launcher = _launcher(sweep, configs)
    folder = Path(sweep.folder)
    with _held(folder):
        study = _take_up(sweep, overrides, points)
        began = time.monotonic()
        places, sweep_run = launcher.free(), SweepRun(sweep, overrides, launcher, study)
        complete = sweep_run.run(points, configs)
        if not sweep.launcher:
            _note_use(folder, time.monotonic() - began, sweep_run.busy_seconds, places)
    outcomes = [read_outcome(point.folder(folder)) for point in read_points(folder)]
    if any(outcomes):
        print(f"report: {write_report(read_results(folder))}")
    resume = f"dla-sweep resume {shlex.quote(str(folder))}"
    if not complete:
        print(f"stopped; go on with: {resume}")
        return STOPPED
    failed = sum(outcome is not None and outcome.state == "failed" for outcome in outcomes)
    if failed:
        mend = "raise sweep.budget" if study else f"again: {resume} sweep.retry_failed=true"
        print(f"{failed} of {len(outcomes)} points failed; {mend}")
    return FAILED if failed else 0


def submit(sweep: SweepConfig, overrides: Sequence[str]) -> int:
    """Queue what is left as one job array. Raises ConfigError before anything is queued, SubmitError of the cluster."""
    if sweep.sampler == "tpe":
        rule = "is a search, which proposes points one by one, from how earlier ones ended"
        raise ConfigError(f"sweep.sampler=tpe {rule}; leave out `submit`, and dla-sweep stays and queues them")
    settings = _cluster(sweep)
    points, configs = checked_points(sweep, overrides)
    check_array(sweep, settings, len(points))
    with _held(Path(sweep.folder)):
        _take_up(sweep, overrides, points)
        submission = submit_points(sweep, settings, points, configs)
    print(submission.told())
    print(f"how it stands: dla-runs {sweep.folder}; what came out: dla-sweep report {sweep.folder}")
    return 0


def checked_points(sweep: SweepConfig, overrides: Sequence[str]) -> tuple[list[Point], dict[str, Config]]:
    """The points that are known before the start, each legal. Raises ConfigError."""
    settings = baseline_settings(sweep)
    if sweep.sampler == "tpe":
        check_corners(sweep, overrides)
    else:
        settings += swept_settings(sweep)
    points = points_of(sweep, overrides, settings)
    return points, check_points(sweep, points)


def _launcher(sweep: SweepConfig, configs: dict[str, Config]) -> Launcher:
    """Where points run. Raises ConfigError."""
    if sweep.launcher:
        return slurm_launcher(_cluster(sweep), sweep.name, sweep.parallel)
    on_cpu = all(config.train.device == "cpu" for config in configs.values())
    return local_launcher(sweep.parallel, sweep.ranks, on_cpu=on_cpu)


def _cluster(sweep: SweepConfig) -> LauncherConfig:
    """How a point is launched on a cluster. Raises ConfigError where that is not said, or of other ranks."""
    if not sweep.launcher:
        raise ConfigError("points are queued on a cluster by launcher=slurm; add it, or leave out `submit`")
    settings = load_launcher(sweep.launcher, ranks_per_node=sweep.ranks)
    if settings.kind != "slurm":
        raise ConfigError("launcher=torchrun is what points get on this machine by sweep.ranks; leave launcher out")
    given = settings.nodes * settings.ranks_per_node
    if given != sweep.ranks:
        where = f"launcher.nodes={settings.nodes} x launcher.ranks_per_node={settings.ranks_per_node}"
        raise ConfigError(f"sweep.ranks={sweep.ranks} is not {where} = {given} processes of a point; make them equal")
    return settings


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The sweep's folder, made where it is not there, and nobody else's meanwhile. Raises ConfigError."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = RunLock(folder)
    except RunDirectoryError as error:
        raise ConfigError(f"sweep.folder={folder} is at work already: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _take_up(sweep: SweepConfig, overrides: Sequence[str], points: Sequence[Point]) -> Study | None:
    """Make the folder this sweep's, and settle what ended there unseen. Returns its search; raises ConfigError."""
    folder = Path(sweep.folder)
    check_folder(folder, points, grows=lambda point: sweep.sampler == "tpe" and point.trial is not None)
    settle(folder, sweep)
    if not sweep.launcher:
        refuse_queued(folder, points)
    study = Study(sweep) if sweep.sampler == "tpe" else None
    write_atomically(folder / SWEEP_FILE, json.dumps({"sweep": asdict(sweep), "overrides": overrides}, indent=1))
    if sweep.retry_failed:
        _forget_failures(folder, points)
    return study


def _forget_failures(folder: Path, points: Sequence[Point]) -> None:
    for point in points:
        outcome = read_outcome(point.folder(folder))
        if outcome and outcome.state == "failed":
            forget_outcome(point.folder(folder))


def _list(sweep: SweepConfig, overrides: list[str]) -> int:
    points, _ = checked_points(sweep, overrides)
    for point in points:
        print(point.name, *point.overrides)
    search = f" and {sweep.budget} settings that tpe will propose" if sweep.sampler == "tpe" else ""
    print(f"{len(points)} points{search}, all legal; {sweep.folder}")
    return 0


def _stored(words: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """The sweep of a folder, with changes such as sweep.parallel=2."""
    folder, stored = _only_folder([word for word in words if "=" not in word]), {}
    path = folder / SWEEP_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {SWEEP_FILE}; name the folder of a sweep")
    stored = json.loads(path.read_text(encoding="utf-8"))
    values: dict[str, Any] = stored["sweep"] | {"retry_failed": False}
    for word in (word for word in words if "=" in word):
        key, _, value = word.partition("=")
        if key not in ("sweep.parallel", "sweep.retry_failed", "sweep.attempts"):
            raise ConfigError(f"{word} cannot be changed here: sweep.parallel, attempts and retry_failed can")
        values[key.removeprefix("sweep.")] = value
    sweep = sweep_from_dict(values)
    check_sweep(sweep, stored["overrides"])
    return sweep, stored["overrides"]


def _named_or_stored(words: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """The sweep that words describe, or that of the folder they name."""
    named = any(word.startswith("sweep=") for word in words)
    return read_sweep(words) if named or not words else _stored(words)


def _report(words: Sequence[str]) -> int:
    named, to = list(words), None
    if "--to" in named:
        at = named.index("--to")
        if len(named) == at + 1:
            raise ConfigError("--to names no folder; write dla-sweep report FOLDER --to OTHER")
        to = Path(named[at + 1])
        del named[at : at + 2]
    folder = _only_folder(named)
    if not is_kept(folder) and not seems_held(folder):  # nobody watches
        settle(folder, open_results(folder).sweep)
    results = open_results(folder)
    print(write_report(results, folder if to is None and is_kept(folder) else to))
    return 0


def _only_folder(words: Sequence[str]) -> Path:
    if len(words) != 1:
        raise ConfigError(f"{len(words)} folders were named; name the one folder of a sweep")
    return Path(words[0])


def _note_use(folder: Path, seconds: float, busy_seconds: float, places: int) -> None:
    """How well the machine was used: places taken, and processor time of the points that this process started."""
    if not busy_seconds:
        return
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor, cores = used.ru_utime + used.ru_stime, available_cores()
    use = {"seconds": seconds, "processor_seconds": processor, "cores": cores, "places": places}
    shares = {"places_taken": busy_seconds / seconds / places, "cores_busy": processor / seconds / cores}
    write_atomically(folder / USE_FILE, json.dumps(use | shares, indent=1))
    print(
        f"{seconds:.0f} s with {places} points at a time, {shares['places_taken']:.0%} of the places taken; "
        f"{processor:.0f} s of processor time, {shares['cores_busy']:.0%} of {cores} cores"
    )


if __name__ == "__main__":
    main()
