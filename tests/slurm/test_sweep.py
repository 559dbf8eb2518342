"""dla-sweep launcher=slurm on a real SLURM of one node: points are jobs, and how they end is told."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dla_train.metrics import read_lines
from dla_train.sweep.command import run
from dla_train.sweep.outcomes import read_outcome
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
    place = ["launcher=slurm", "launcher.cpus_per_rank=1", "launcher.gpus=false"]
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
    told, _ = second.communicate(timeout=100)
    assert second.returncode == 75 and "saved" in told, told
    assert json.loads((point / "start.json").read_text())["slurm_job"] == number
    assert json.loads((point / "status.json").read_text())["state"] == "stopped"
    assert "it stays so" in (point / "output.log").read_text()


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while not any(line["step"] >= step for line in read_lines(run_dir / "metrics.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("word", "part"),
    [("launcher.partition=nowhere", "partition"), ("launcher.time=soon", "hours:minutes"), ("sweep.ranks=2", "equal")],
)
def test_what_the_cluster_would_refuse_starts_nothing(
    words: list[str], word: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "launcher.ranks_per_node=1", "train.micro_batch_rows=2", word]) == 2
    assert part in capsys.readouterr().err and not (tmp_path / "sweep").exists()
