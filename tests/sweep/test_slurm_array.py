"""A sweep as one job array, with a SLURM that only keeps books: what is queued, what is left, how points ended."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dla_train.checkpoint.run_lock import RunLock, process_record
from dla_train.config import ConfigError
from dla_train.durable import write_atomically
from dla_train.sweep import command, slurm_array
from dla_train.sweep.outcomes import Outcome, read_outcome
from dla_train.sweep.slurm_launcher import SlurmJob, SlurmLauncher, job_of
from tests.sweep.conftest import FakeJob, leave

POINTS = ("single-seed_0", "tau_0.5-seed_0", "tau_0.7-seed_0")
BOOKS = {
    "sbatch": """[ ! -e refuse ] || { echo "Invalid partition" >&2; exit 1; }
[ "$2" = --test-only ] && exec cat > tested
count=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$2")
echo x >> arrays; number=$((100 + $(wc -l < arrays)))
for task in $(seq 0 "$count"); do echo ${number}_$task >> queue; done
echo $number""",
    "squeue": "[ ! -e silent ] && cat queue",
    "scontrol": """case "$1 $2" in
    "show hostnames") echo localhost;;
    "show job") cat "$3";;
    *) echo "$2" >> requeued;;
esac""",
    "sleep": "",
    "srun": """for word; do case $word in run_dir=*) run=${word#run_dir=};; esac; done
echo '{"state": "stopped", "step": 3}' > "$run/status.json"; exit 1""",
}
"""What the commands of SLURM are here: shell, in the folder of the books."""


@dataclass
class Books:
    """The made-up SLURM."""

    folder: Path

    def queue(self) -> list[str]:
        return (self.folder / "queue").read_text().split()

    def end(self, *numbers: str) -> None:
        """Jobs leave the queue."""
        left = [number for number in self.queue() if number not in numbers]
        (self.folder / "queue").write_text("".join(f"{number}\n" for number in left))

    def arrays(self) -> int:
        file = self.folder / "arrays"
        return len(file.read_text().split()) if file.exists() else 0


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Books:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "queue").touch()
    for name, text in BOOKS.items():
        (folder / name).write_text(f"#!/bin/bash\ncd {folder} || exit 1\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    # every question is asked anew
    monkeypatch.setattr("dla_train.sweep.slurm_launcher.LOOK_SECONDS", -1.0)
    return Books(folder)


@pytest.fixture
def submit(sweep, books: Books, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """submit("sweep.parallel=2", ...) -> what `dla-sweep submit` says of the small sweep."""

    def do(*words: str) -> str:
        place = ["launcher=slurm", "launcher.gpus=false", *words]
        assert command.submit(*sweep(*place)) == 0
        return capsys.readouterr().out

    return do


def folder_of(tmp_path: Path, name: str) -> Path:
    return tmp_path / "sweep/points" / name


def ends(tmp_path: Path, name: str, kind: str, number: float = 1.0) -> None:
    """A point's task has ended in this way."""
    run_dir = folder_of(tmp_path, name)
    with open(run_dir / "output.log", "a") as output:
        output.write("job 101_0, start 0\n")
    if kind == "stops":
        FakeJob(run_dir, ("works", 1.0)).stop()
    elif kind == "errs":
        with open(run_dir / "output.log", "a") as output:
            output.write("dla-train: error: data.train=[nowhere] is not there\n")
    else:
        leave(FakeJob(run_dir, (kind, number)), kind, number)


def test_all_points_are_queued_as_one_array_whose_tasks_run_in_their_own_folders(
    submit: Callable[..., str], books: Books, tmp_path: Path
) -> None:
    told = submit("sweep.parallel=2", "launcher.partition=cpu")
    assert "job 101: 3 points are queued as one array (0 still queued or running, 0 ended)" in told
    assert f"dla-sweep report {tmp_path}/sweep" in told
    assert books.arrays() == 1 and books.queue() == ["101_0", "101_1", "101_2"]
    (here,) = (tmp_path / "sweep/arrays").iterdir()
    script = (here / "array.sh").read_text()
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    expected = {"--array=0-2%2", f"--output={here}/%a/output.log", "--requeue", "--open-mode=append"}
    assert expected | {"--partition=cpu", "--signal=B:USR1@600"} <= set(lines)
    assert [(here / str(task)).resolve() for task in range(3)] == [folder_of(tmp_path, name) for name in POINTS]
    assert (here / "number").read_text() == "101"
    for task, name in enumerate(POINTS):
        assert job_of(folder_of(tmp_path, name)) == f"101_{task}"
        job = (folder_of(tmp_path, name) / "job.sh").read_text()
        assert f"run_dir={folder_of(tmp_path, name)}" in job and "logging.progress=false" in job
    assert "#SBATCH --array=0-2%2\n" in (books.folder / "tested").read_text()


def test_without_a_bound_the_cluster_decides_how_many_run(submit: Callable[..., str], tmp_path: Path) -> None:
    submit()
    assert "#SBATCH --array=0-2\n" in next((tmp_path / "sweep/arrays").glob("*/array.sh")).read_text()


def run_task(books: Books, script: Path, number: str, task: int) -> subprocess.CompletedProcess[str]:
    numbers = {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "777"}
    environment = {**os.environ, **numbers, "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here"}
    return subprocess.run(["bash", script], capture_output=True, text=True, env=environment, timeout=30)


def test_a_task_runs_its_points_script_and_queues_itself_again_and_not_the_whole_array(
    submit: Callable[..., str], books: Books, tmp_path: Path
) -> None:
    submit()
    script = next((tmp_path / "sweep/arrays").glob("*/array.sh"))
    done = run_task(books, script, "101", 1)
    assert "job 101_1, start 0" in done.stdout and "stopped; queued again" in done.stdout, done.stderr
    assert (books.folder / "requeued").read_text() == "101_1\n"
    assert json.loads((folder_of(tmp_path, POINTS[1]) / "status.json").read_text())["state"] == "stopped"
    assert not (folder_of(tmp_path, POINTS[0]) / "status.json").exists()


def test_a_task_that_was_cancelled_does_not_queue_itself_again(
    submit: Callable[..., str], books: Books, tmp_path: Path
) -> None:
    submit()
    (books.folder / "101_1").write_text("JobId=102 JobState=COMPLETING Reason=None\n")
    done = run_task(books, next((tmp_path / "sweep/arrays").glob("*/array.sh")), "101", 1)
    assert done.returncode == 75 and "stopped; it stays so" in done.stdout, done.stderr
    assert not (books.folder / "requeued").exists()


def test_tasks_of_a_submission_that_was_killed_before_it_wrote_the_number_down_end_at_once(
    submit: Callable[..., str], books: Books, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(path: Path, text: str) -> None:
        if path.name == "number":
            raise Killed
        write_atomically(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(slurm_array, "write_atomically", killed)
        with pytest.raises(Killed):
            submit()
    script = next((tmp_path / "sweep/arrays").glob("*/array.sh"))
    assert books.queue() == ["101_0", "101_1", "101_2"]
    assert "job 102: 3 points are queued" in submit()
    done = run_task(books, script, "101", 0)
    assert done.returncode == 1 and "submit again" in done.stderr
    assert not (folder_of(tmp_path, POINTS[0]) / "status.json").exists(), "nothing ran"


def test_the_next_submission_queues_what_has_neither_ended_nor_is_still_there(
    submit: Callable[..., str], books: Books, tmp_path: Path
) -> None:
    submit()
    assert "nothing is left to queue: 3 still queued or running, 0 ended" in submit()
    ends(tmp_path, POINTS[0], "finishes", 2.5)
    ends(tmp_path, POINTS[1], "stops")
    books.end("101_0", "101_1")
    assert "job 102: 1 point is queued as one array (1 still queued or running, 1 ended)" in submit()
    assert [job_of(folder_of(tmp_path, name)) for name in POINTS] == ["101_0", "102_0", "101_2"]
    assert read_outcome(folder_of(tmp_path, POINTS[0])) == Outcome("finished", 8, 2.5)
    assert books.arrays() == 2 and books.queue() == ["101_2", "102_0"]


def test_the_folder_alone_names_the_sweep_and_more_seeds_are_queued_beside_it(
    submit: Callable[..., str], books: Books, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit()
    assert command.run(["submit", f"{tmp_path}/sweep"]) == 0
    assert "nothing is left" in capsys.readouterr().out
    assert "job 102: 3 points are queued as one array (3 still" in submit("sweep.seeds=[0,1]")


def test_a_failed_point_stays_failed_with_its_reason_until_it_is_asked_for(
    submit: Callable[..., str], books: Books, tmp_path: Path
) -> None:
    submit()
    ends(tmp_path, POINTS[0], "diverges")
    ends(tmp_path, POINTS[1], "errs")
    books.end("101_0", "101_1")
    assert "nothing is left to queue: 1 still queued or running, 2 ended" in submit()
    found = [read_outcome(folder_of(tmp_path, name)) for name in POINTS[:2]]
    assert [(outcome.state, outcome.reason) for outcome in found if outcome] == [
        ("failed", "loss is nan"),
        ("failed", "data.train=[nowhere] is not there"),
    ]
    assert "job 102: 2 points are queued" in submit("sweep.retry_failed=true")
    books.end("102_0")
    submit()
    assert read_outcome(folder_of(tmp_path, POINTS[0])) is None, "its status is of the start before"


def test_a_task_that_dies_is_queued_again_and_fails_at_the_last_attempt(
    submit: Callable[..., str], books: Books, tmp_path: Path
) -> None:
    submit()
    ends(tmp_path, POINTS[0], "dies")
    books.end("101_0")
    assert "job 102: 1 point is" in submit()
    books.end("102_0")
    assert "job 103: 1 point is" in submit(), "a task that was taken out of the queue has not begun"
    ends(tmp_path, POINTS[0], "stops")
    books.end("103_0")
    assert "job 104: 1 point is" in submit(), "one that was stopped goes on"
    ends(tmp_path, POINTS[0], "dies")
    books.end("104_0")
    assert "nothing is left" in submit()
    outcome = read_outcome(folder_of(tmp_path, POINTS[0]))
    assert outcome and outcome.state == "failed" and "(2 starts)" in outcome.reason
    assert "job 105: 1 point is" in submit("sweep.retry_failed=true")
    ends(tmp_path, POINTS[0], "dies")
    books.end("105_0")
    assert "job 106: 1 point is" in submit(), "attempts are counted anew"


def test_a_report_settles_what_has_ended_unless_a_sweep_watches(
    submit: Callable[..., str], books: Books, tmp_path: Path
) -> None:
    submit()
    ends(tmp_path, POINTS[0], "finishes", 2.5)
    ends(tmp_path, POINTS[1], "errs")
    books.end("101_0", "101_1")
    lock = RunLock(tmp_path / "sweep")
    assert command.run(["report", f"{tmp_path}/sweep"]) == 0
    assert read_outcome(folder_of(tmp_path, POINTS[0])) is None
    lock.release()
    (books.folder / "silent").touch()
    assert command.run(["report", f"{tmp_path}/sweep"]) == 0
    assert read_outcome(folder_of(tmp_path, POINTS[0])) == Outcome("finished", 8, 2.5), "no queue is needed for that"
    assert read_outcome(folder_of(tmp_path, POINTS[1])) is None, "it may be queued again"
    (books.folder / "silent").unlink()
    assert command.run(["report", f"{tmp_path}/sweep"]) == 0
    assert "data.train=[nowhere]" in (tmp_path / "sweep/report.md").read_text()


def test_where_the_queue_does_not_answer_nothing_is_started_a_second_time(
    submit: Callable[..., str], books: Books, tmp_path: Path
) -> None:
    submit()
    ends(tmp_path, POINTS[0], "stops")
    books.end("101_0")
    (books.folder / "silent").touch()
    assert "nothing is left to queue: 3 still" in submit()


def test_points_of_a_sweep_on_this_machine_and_of_single_jobs_are_not_queued_while_they_work(
    submit: Callable[..., str], books: Books, tmp_path: Path
) -> None:
    for name, record in ((POINTS[0], process_record(os.getpid())), (POINTS[1], {"slurm_job": "7"})):
        folder_of(tmp_path, name).mkdir(parents=True)
        (folder_of(tmp_path, name) / "start.json").write_text(json.dumps(record))
    (books.folder / "queue").write_text("7\n")
    assert "job 101: 1 point is queued as one array (2 still" in submit()
    assert job_of(folder_of(tmp_path, POINTS[2])) == "101_0"


def test_a_sweep_on_this_machine_is_refused_while_tasks_are_queued(
    sweep, submit: Callable[..., str], books: Books, tmp_path: Path
) -> None:
    submit()
    books.end("101_0", "101_2")
    ends(tmp_path, POINTS[0], "finishes", 2.5)
    stored = (tmp_path / "sweep/sweep.json").read_text()
    with pytest.raises(ConfigError, match=r"tau_0.5-seed_0 is job 101_1 .*dla-sweep resume .*scancel 101_1"):
        command.start(*sweep())
    assert (tmp_path / "sweep/sweep.json").read_text() == stored, "it is still known how to go on"


def test_a_watching_sweep_takes_over_queued_tasks(submit: Callable[..., str], books: Books, tmp_path: Path) -> None:
    submit()
    books.end("101_0")
    launcher = SlurmLauncher(None, "small", 0)  # type: ignore[arg-type]  # it starts nothing here
    found = [launcher.adopt(folder_of(tmp_path, name)) for name in POINTS]
    assert [job and isinstance(job, SlurmJob) and job.number for job in found] == [None, "101_1", "101_2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep.sampler=tpe", "sweep.budget=3", "launcher=slurm"], "sweep.sampler=tpe is a search.*one by one"),
        ([], "add it"),
        (["launcher=torchrun"], "leave launcher out"),
        (["launcher=slurm", "launcher.ranks_per_node=2"], "sweep.ranks=1 is not .* = 2"),
        (["launcher=slurm", "sweep.axes.memory.tau=[7]"], "points are illegal"),
    ],
)
def test_what_cannot_be_an_array_is_refused_with_the_mend(
    words: list[str], message: str, sweep, books: Books, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        command.submit(*sweep(*words))
    assert not (tmp_path / "sweep").exists() and books.arrays() == 0


def test_what_the_cluster_refuses_is_told_and_nothing_is_written(sweep, books: Books, tmp_path: Path) -> None:
    (books.folder / "refuse").touch()
    with pytest.raises(ConfigError, match=r"Invalid partition; .*array of 3 tasks.*MaxArraySize"):
        command.submit(*sweep("launcher=slurm"))
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_at_work_in_the_folder_is_left_alone(sweep, books: Books, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    lock = RunLock(tmp_path / "sweep")
    try:
        with pytest.raises(ConfigError, match="is at work already"):
            command.submit(*sweep("launcher=slurm"))
    finally:
        lock.release()
    assert books.arrays() == 0
