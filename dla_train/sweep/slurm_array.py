"""A sweep as one job array of SLURM (`dla-sweep submit`): queued at once, and watched by nobody.

Every point that has neither ended nor is at work becomes a task, which runs the batch script of `dla-launch` in the
point's folder. `arrays/<time>/` in the sweep's folder holds what was queued: the array's script, a link to the point of
each task, and the array's number. Tasks whose number was not written down end at once, so a submission that is killed
at any moment starts nothing twice. How points ended is settled from what their runs left: by the next `submit`,
`report` or start of the sweep.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dla_train.checkpoint.run_lock import process_lives, seems_held
from dla_train.config import Config, ConfigError
from dla_train.durable import write_atomically
from dla_train.launch.settings import LauncherConfig
from dla_train.launch.slurm import SubmitError, directives, job_script, submit, try_submission
from dla_train.sweep.definition import SweepConfig
from dla_train.sweep.launchers import OUTPUT_FILE, START_FILE, START_LINE, read_start
from dla_train.sweep.outcomes import (
    began,
    ending,
    failed_outcome,
    finished_outcome,
    read_outcome,
    status_stamp,
    write_outcome,
)
from dla_train.sweep.points import Point, read_points, run_words, write_point
from dla_train.sweep.slurm_launcher import ARRAYS_FOLDER, JOB_FILE, NUMBER_FILE, Queue, SlurmJob, job_of

ARRAY_FILE = "array.sh"
# the file system of a cluster may show a new file to other machines a minute late
SCRIPT = """#!/usr/bin/env bash
{directives}
here={here}
for _ in {{1..100}}; do
    [ -e "$here/{number}" ] && break
    sleep 1
done
if [ "$(cat "$here/{number}" 2> /dev/null)" != "$SLURM_ARRAY_JOB_ID" ]; then
    echo "dla-sweep was ended before it wrote down that it had queued array $SLURM_ARRAY_JOB_ID; submit again" >&2
    exit 1
fi
exec bash "$here/$SLURM_ARRAY_TASK_ID/{job}" "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
"""


@dataclass(frozen=True)
class Submission:
    """What `submit_points` found and did."""

    number: str
    """Of the array; "" where nothing was left to queue."""
    queued: list[Point]
    at_work: list[Point]
    """Queued or running before."""
    ended: list[Point]

    def told(self) -> str:
        """In a sentence."""
        others = f"{len(self.at_work)} still queued or running, {len(self.ended)} ended"
        if not self.number:
            return f"nothing is left to queue: {others}"
        count = "1 point is" if len(self.queued) == 1 else f"{len(self.queued)} points are"
        return f"job {self.number}: {count} queued as one array ({others})"


def check_array(sweep: SweepConfig, settings: LauncherConfig, count: int) -> None:
    """Raise ConfigError where the cluster would refuse an array of `count` points; nothing is written."""
    try:
        try_submission(array_script(sweep, settings, Path("/dev"), count))
    except SubmitError as error:
        raise ConfigError(f"{error} (an array of {count} tasks; the cluster's MaxArraySize bounds them)") from error


def array_script(sweep: SweepConfig, settings: LauncherConfig, here: Path, count: int) -> str:
    """The batch script of `count` tasks, sweep.parallel of them at a time, whose links lie in the folder `here`."""
    at_a_time = f"%{sweep.parallel}" if sweep.parallel else ""
    lines = [
        *directives(settings, sweep.name, here / "%a" / OUTPUT_FILE),
        f"--array=0-{count - 1}{at_a_time}",
    ]
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in lines),
        here=shlex.quote(str(here)),
        number=NUMBER_FILE,
        job=JOB_FILE,
    )


def submit_points(
    sweep: SweepConfig, settings: LauncherConfig, points: Sequence[Point], configs: dict[str, Config]
) -> Submission:
    """Queue what has neither ended nor is at work. The caller holds the folder's lock, and has settled the folder."""
    folder, queue = Path(sweep.folder), Queue()
    ended = [point for point in points if read_outcome(point.folder(folder))]
    rest = [point for point in points if point not in ended]
    busy = [point for point in rest if at_work(point.folder(folder), queue)]
    left = [point for point in rest if point not in busy]
    if not left:
        return Submission("", [], busy, ended)
    here = folder.resolve() / ARRAYS_FOLDER / datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    here.mkdir(parents=True)
    for task, point in enumerate(left):
        write_point(folder, point, configs[point.name])
        (here / str(task)).symlink_to(Path("../..", point.folder(Path())))
        _prepare(sweep, settings, point, here.name, task)
    (here / ARRAY_FILE).write_text(array_script(sweep, settings, here, len(left)), encoding="utf-8")
    number = submit(here / ARRAY_FILE)
    write_atomically(here / NUMBER_FILE, number)
    return Submission(number, left, busy, ended)


def at_work(run_dir: Path, queue: Queue) -> bool:
    """Whether a point's run is queued or running, as far as can be told from here."""
    number = job_of(run_dir)
    if number is not None:
        return queue.holds(number)
    lives = process_lives(read_start(run_dir))
    return seems_held(run_dir) if lives is None else lives


def settle(folder: Path, sweep: SweepConfig) -> None:
    """Write down how the tasks ended that nobody watched; those that can go on are left to the next submission.

    folder: of the sweep, wherever it lies now.
    """
    queue = Queue()
    for point in read_points(folder):
        run_dir = point.folder(folder)
        record, number = read_start(run_dir), job_of(run_dir)
        if "slurm_array" not in record or number is None or read_outcome(run_dir):
            continue
        if ending(run_dir, None, record["status"]) == "finished":  # also where there is no queue to ask
            write_outcome(run_dir, finished_outcome(run_dir, sweep.objective))
        elif not queue.holds(number):
            code, deaths = SlurmJob(number, run_dir, queue).exit_code(), _deaths(run_dir)
            if ending(run_dir, code, record["status"]) == "failed" or deaths >= sweep.attempts:
                write_outcome(run_dir, failed_outcome(run_dir, code, deaths))


def refuse_queued(folder: Path, points: Iterable[Point]) -> None:
    """Raise ConfigError if points that are to run on this machine are queued or running on the cluster."""
    queue = Queue()
    for point in points:
        number = job_of(point.folder(folder))
        if number is not None and not read_outcome(point.folder(folder)) and queue.holds(number):
            raise ConfigError(
                f"{point.name} is job {number} of SLURM, and squeue shows it still, or does not answer here; watch it "
                f"where it was queued (dla-sweep resume {folder}), or `scancel {number}` first"
            )


def _prepare(sweep: SweepConfig, settings: LauncherConfig, point: Point, array: str, task: int) -> None:
    """Write what a task runs, and what `settle` needs later, into its point's folder."""
    run_dir = point.folder(Path(sweep.folder))
    output = run_dir.resolve() / OUTPUT_FILE
    record = {"slurm_array": array, "task": task, "deaths": _deaths(run_dir), "status": status_stamp(run_dir)}
    with open(output, "a", encoding="utf-8") as file:
        file.write(START_LINE)
    write_atomically(run_dir / START_FILE, json.dumps(record))
    words = run_words(sweep, point)
    script = job_script(settings, f"{sweep.name}-{point.name}", run_dir, words, sys.executable, output)
    write_atomically(run_dir / JOB_FILE, script)


def _deaths(run_dir: Path) -> int:
    """How often a task of this point has begun and ended without a word, of those that were queued since it failed."""
    record = read_start(run_dir)
    if "slurm_array" not in record:
        return 0
    died = began(run_dir) and ending(run_dir, None, record["status"]) == "died"
    return int(record["deaths"]) + died
