"""dla-launch on a real SLURM of one node: a run is warned before its limit, saves, is queued again, and finishes."""

import re
import time
from pathlib import Path

import pytest
import torch

from dla_train.checkpoint.folders import complete_steps
from dla_train.launch.command import main
from dla_train.resilience.exit_codes import read_status
from dla_train.trackers import read_lines
from tests.slurm.cluster import Cluster
from tests.train.runs import ROOT, TINY, numbers_of, run_training, tensors_of

pytestmark = pytest.mark.slurm
STEPS = 120
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}


def submit(cluster: Cluster, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> str:
    """The number of the job."""
    for key, value in cluster.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/kernels")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = ["launcher=slurm", "launcher.ranks_per_node=2", "launcher.cpus_per_rank=1", "launcher.gpus=false"]
    code = main([*small, *arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return re.match(r"job (\d+) is queued", out)[1]


def wait_for_step(run_dir: Path, step: int, seconds: float = 300) -> None:
    """Until metrics.jsonl has a line of `step`."""
    deadline = time.monotonic() + seconds
    while not any(line["step"] >= step for line in read_lines(run_dir / "metrics.jsonl")):
        assert time.monotonic() < deadline, f"step {step} was not reached in {seconds} s"
        time.sleep(0.05)


def test_a_job_that_is_warned_saves_queues_itself_again_and_finishes_with_the_weights_of_an_uninterrupted_run(
    cluster: Cluster, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = [*TINY, *corpus, "train.micro_batch_rows=2", f"train.steps={STEPS}"]
    number = submit(cluster, [*run, f"run_dir={tmp_path}/run"], monkeypatch, capsys)
    wait_for_step(tmp_path / "run", 20)
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    job = cluster.wait(number, ENDED, 600)
    log = next((tmp_path / "run/launches").glob("*/slurm-*.log")).read_text()
    assert job["JobState"] == "COMPLETED" and job["Restarts"] == "1", log[-3000:]
    assert "USR1: the run is asked to stop" in log and "stopped; queued again" in log and "continues after step" in log
    assert log.count("first step done") == 2 and "srun and torchrun" in log
    status = read_status(tmp_path / "run")
    assert status and status["state"] == "finished"
    run_training(tmp_path / "whole.json", [[*run, f"run_dir={tmp_path}/whole"]], ranks=2)
    names = ("loss", "grad_norm", "lr", "boundary_rate")
    assert numbers_of(tmp_path / "run", *names) == numbers_of(tmp_path / "whole", *names)
    expected, found = (tensors_of(tmp_path / name, STEPS) for name in ("whole", "run"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if not name.startswith("rng/"))


def test_slurm_warns_before_the_time_limit_and_the_job_saves_and_queues_itself_again(
    cluster: Cluster, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = [*TINY, *corpus, "train.micro_batch_rows=2", "train.steps=100000", f"run_dir={tmp_path}/run"]
    limits = ["launcher.time=1:00", "launcher.warn_seconds=30"]
    number = submit(cluster, [*limits, *run], monkeypatch, capsys)
    job = cluster.wait(number, {"PENDING"}, 90, after="RUNNING")
    cluster.run("scancel", number)
    log = next((tmp_path / "run/launches").glob("*/slurm-*.log")).read_text()
    assert job["Restarts"] == "1" and "USR1: the run is asked to stop" in log, log[-3000:]
    status = read_status(tmp_path / "run")
    assert status is None or (status["state"] == "stopped" and complete_steps(tmp_path / "run/checkpoints"))


def test_a_job_that_another_preempts_saves_and_goes_on_when_that_has_ended(
    cluster: Cluster, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = [*TINY, *corpus, "train.micro_batch_rows=2", f"train.steps={STEPS}", f"run_dir={tmp_path}/run"]
    number = submit(cluster, run, monkeypatch, capsys)
    wait_for_step(tmp_path / "run", 5)
    cluster.run("sbatch", "--partition=urgent", "--output=/dev/null", "--wrap=sleep 2")
    job = cluster.wait(number, ENDED, 600)
    log = next((tmp_path / "run/launches").glob("*/slurm-*.log")).read_text()
    assert job["JobState"] == "COMPLETED" and int(job["Restarts"]) >= 1, log[-3000:]
    # within GraceTime SLURM sends SIGTERM to the step, past the batch shell
    assert "SIGTERM: the run stops and is saved" in log and "stopped; queued again" in log
    assert "continues after step" in log
    assert [step for step, _ in numbers_of(tmp_path / "run", "loss")] == list(range(1, STEPS + 1))


def test_a_job_that_fails_is_reported_as_failed_and_not_queued_again(
    cluster: Cluster, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = [*TINY, *corpus, "train.micro_batch_rows=2", f"run_dir={tmp_path}/run"]
    missing_file = [f"data.train=[{tmp_path}/absent]"]
    unseen = ["launcher.restarts=0", "launcher.preflight=false"]
    number = submit(cluster, [*unseen, *run, *missing_file], monkeypatch, capsys)
    job = cluster.wait(number, ENDED, 300)
    log = next((tmp_path / "run/launches").glob("*/slurm-*.log")).read_text()
    assert job["JobState"] == "FAILED" and job["Restarts"] == "0", log[-2000:]
    assert "dla-train: error:" in log and "absent" in log


def test_what_the_cluster_refuses_is_told_and_nothing_is_written(
    cluster: Cluster, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for key, value in cluster.environment.items():
        monkeypatch.setenv(key, value)
    small = ["launcher=slurm", "launcher.ranks_per_node=1", "launcher.cpus_per_rank=1", "launcher.gpus=false"]
    code = main([*small, "launcher.partition=nowhere", *TINY, *corpus, f"run_dir={tmp_path}/run"])
    assert code == 2 and "sbatch refused the job" in (err := capsys.readouterr().err) and "partition" in err
    assert not (tmp_path / "run").exists()
