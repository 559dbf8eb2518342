"""dla-sweep on a real SLURM of one node: points are jobs, or tasks of one array, and how they end is told."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dla_train.sweep.command import run
from dla_train.sweep.outcomes import read_outcome
from dla_train.trackers import read_lines
from tests.slurm.cluster import Cluster
from tests.train.runs import ROOT, TINY

pytestmark = pytest.mark.slurm


@pytest.fixture
def words(cluster: Cluster, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two settings, and a place in this cluster."""
    for key, value in (cluster.environment | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}).items():
        monkeypatch.setenv(key, value)
    file = tmp_path / "small.yaml"
    file.write_text("settings: [memory=dla]\naxes: {memory.tau: [0.5, 0.9]}\n")
    place = ["launcher=slurm", "launcher.cpus_per_rank=1", "launcher.gpus=false", "launcher.restarts=0"]
    runs = [word for word in TINY if not word.startswith("name=")]
    validations = ["train.validation_batches=1", "checkpoint.interval_steps=2"]
    return [f"sweep={file}", f"sweep.folder={tmp_path}/sweep", *place, *runs, *corpus, *validations]


def test_points_are_jobs_that_finish_or_fail_and_are_reported_so(words: list[str], tmp_path: Path) -> None:
    broken = "sweep.baselines.broken=['data.train=[nowhere]']"
    assert run([*words, broken]) == 1
    points = {path.name: read_outcome(path) for path in (tmp_path / "sweep/points").iterdir()}
    assert {name: outcome and outcome.state for name, outcome in points.items()} == {
        "tau_0.5-seed_0": "finished",
        "tau_0.9-seed_0": "finished",
        "broken-seed_0": "failed",
    }
    assert "nowhere" in points["broken-seed_0"].reason
    assert "nowhere" in (tmp_path / "sweep/report.md").read_text()
    jobs = [json.loads(path.read_text())["slurm_job"] for path in tmp_path.glob("sweep/points/*/start.json")]
    assert len(set(jobs)) == 3


def test_a_killed_sweep_finds_its_jobs_again_and_a_stopped_one_saves_them(words: list[str], tmp_path: Path) -> None:
    long = [*words, "train.steps=4000", "sweep.axes.memory.tau=[0.5]"]
    command = [sys.executable, "-m", "dla_train.sweep.command", *long]
    point = tmp_path / "sweep/points/tau_0.5-seed_0"
    first = subprocess.Popen(command)
    wait_for_step(point, 5, first)
    number = json.loads((point / "start.json").read_text())["slurm_job"]
    first.kill()
    first.wait()
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert second.stdout is not None
    assert "tau_0.5-seed_0 is still running" in second.stdout.readline()
    second.send_signal(signal.SIGTERM)
    told, _ = second.communicate(timeout=300)
    assert second.returncode == 75 and "saved" in told, told
    assert json.loads((point / "start.json").read_text())["slurm_job"] == number
    assert json.loads((point / "status.json").read_text())["state"] == "stopped"
    assert "it stays so" in (point / "output.log").read_text()


def test_a_sweep_is_one_array_whose_tasks_are_warned_queued_again_and_finish_or_fail_unwatched(
    cluster: Cluster, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", *words, "train.steps=120", "sweep.baselines.broken=['data.train=[nowhere]']", "sweep.parallel=2"]
    folder = tmp_path / "sweep"
    assert run(words) == 0
    number = re.search(r"job (\d+): 3 points are queued as one array", capsys.readouterr().out)[1]
    wait_for_step(folder / "points/tau_0.5-seed_0", 20)
    assert run(words) == 0 and "nothing is left to queue: " in capsys.readouterr().out
    cluster.run("scancel", "--signal=USR1", "--batch", f"{number}_1")
    cluster.wait_until_empty(600)
    assert run(["report", str(folder)]) == 0
    outcomes = {path.name: read_outcome(path) for path in (folder / "points").iterdir()}
    assert {name: (outcome.state, outcome.step) for name, outcome in outcomes.items() if outcome} == {
        "tau_0.5-seed_0": ("finished", 120),
        "tau_0.9-seed_0": ("finished", 120),
        "broken-seed_0": ("failed", 0),
    }
    assert "nowhere" in outcomes["broken-seed_0"].reason and "nowhere" in (folder / "report.md").read_text()
    warned, other = ((folder / f"points/tau_{tau}-seed_0/output.log").read_text() for tau in ("0.5", "0.9"))
    assert f"job {number}_1, start 0" in warned and f"job {number}_1, start 1" in warned, warned[-3000:]
    assert "stopped; queued again" in warned and "continues after step" in warned
    assert f"job {number}_2, start 0" in other and "start 1" not in other
    capsys.readouterr()
    assert run(words) == 0 and "nothing is left to queue: 0 still" in capsys.readouterr().out


def test_a_watching_sweep_takes_an_array_over_and_stops_it_saved_and_another_submission_goes_on(
    cluster: Cluster, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ["submit", *words, "train.steps=4000", "sweep.axes.memory.tau=[0.5]"]
    point = tmp_path / "sweep/points/tau_0.5-seed_0"
    assert run(long) == 0
    wait_for_step(point, 5)
    watching = [sys.executable, "-m", "dla_train.sweep.command", "resume", str(tmp_path / "sweep")]
    process = subprocess.Popen(watching, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and "tau_0.5-seed_0 is still running" in process.stdout.readline()
    assert run(long) == 2 and "is at work already" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 75 and "saved" in told, told
    saved = json.loads((point / "status.json").read_text())
    assert saved["state"] == "stopped" and "it stays so" in (point / "output.log").read_text()
    assert run(long) == 0
    number = re.search(r"job (\d+): 1 point is queued", capsys.readouterr().out)[1]
    wait_for_step(point, saved["step"] + 1)
    cluster.run("scancel", number)
    cluster.wait_until_empty(300)
    assert f"continues after step {saved['step']}" in (point / "output.log").read_text()


def wait_for_step(run_dir: Path, step: int, process: "subprocess.Popen[bytes] | None" = None) -> None:
    """Until metrics.jsonl has a line of `step`; fails when the process ends before."""
    deadline = time.monotonic() + 300
    while not any(line["step"] >= step for line in read_lines(run_dir / "metrics.jsonl")):
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.05)


@pytest.mark.parametrize("verb", [[], ["submit"]], ids=["watched", "array"])
@pytest.mark.parametrize(
    ("word", "part"),
    [("launcher.partition=nowhere", "partition"), ("launcher.time=soon", "hours:minutes"), ("sweep.ranks=2", "equal")],
)
def test_what_the_cluster_would_refuse_starts_nothing(
    words: list[str], verb: list[str], word: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*verb, *words, "launcher.ranks_per_node=1", "train.micro_batch_rows=2", word]) == 2
    assert part in capsys.readouterr().err and not (tmp_path / "sweep").exists()
