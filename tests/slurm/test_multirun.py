"""Hydra's own multirun on a real SLURM of one node, by submitit: points are jobs; a failing one is reported."""

from pathlib import Path

import pytest

from dla_train.resilience.exit_codes import read_status
from tests.slurm.cluster import Cluster
from tests.train.runs import TINY, numbers_of, run_python

pytestmark = pytest.mark.slurm


def test_points_are_jobs_of_submitit_that_finish_on_two_ranks_or_fail(
    cluster: Cluster, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (cluster.environment | {"RANKS": "2"}).items():
        monkeypatch.setenv(key, value)
    place = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "hydra.launcher.cpus_per_task=2"]
    runs = [word for word in TINY if not word.startswith("name=")]
    train = next(word for word in corpus if word.startswith("data.train="))
    swept = [
        f"data.train=[nowhere],{train.partition('=')[2]}",
        "train.micro_batch_rows=2",
        f"run_dir={tmp_path}/points",
    ]
    words = ["-m", "dla_train.train", "--multirun", *runs, *corpus, *place, *swept]
    done = run_python(words, timeout=600, cwd=tmp_path)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "points/data.train=[nowhere] ended with exit code 1" in done.stderr.splitlines()[-1]
    (finished,) = (path for path in (tmp_path / "points").iterdir() if (read_status(path) or {}).get("state"))
    assert (read_status(finished) or {})["state"] == "finished"
    assert [step for (step,) in numbers_of(finished)] == list(range(1, 9))
    logs = [path.read_text() for path in tmp_path.glob("runs/multirun/*/.submitit/*/*_log.err")]
    assert sum("2 rank(s) on cpu" in log for log in logs) == 1
    assert sum("dla-train: error: nowhere" in log for log in logs) == 1, "what the run said"
