"""dla-launch starts what it says, on two ranks, and leaves the script that starts it again."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from dla_train.parallel.cores import as_ranges, choose_cores
from tests.train.runs import ROOT, TINY, numbers_of, run_python, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_two_ranks_train_and_the_script_that_is_left_goes_on_from_anywhere(corpus: list[str], tmp_path: Path) -> None:
    settings = [*TINY, *corpus, "train.stop_at_step=2", "run_dir=a run"]
    launch = ["-m", "dla_train.launch.command", "launcher.ranks_per_node=2", "launcher.bind=share", *settings]
    done = run_python(launch, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 rank(s) on cpu" in done.stderr and "OMP_NUM_THREADS" not in done.stderr
    allowed = frozenset(os.sched_getaffinity(0))
    own = choose_cores("share", 0, [None, None], allowed)
    assert (f"local rank 0 computes on cores {as_ranges(own)} " in done.stderr) == (own != allowed)
    assert [step for (step,) in numbers_of(tmp_path / "a run")] == [1, 2]
    parts = re.search(r"first step done ([\d.]+) s after the start: (.*)", done.stderr)
    assert parts and done.stderr.count("first step done") == 1, done.stderr
    seconds = dict(part.rsplit(" ", 1) for part in parts[2].split(", "))
    names = ["dla-launch", "torchrun", "imports", "settings", "ranks", "data", "model", "checkpoint", "first step"]
    assert list(seconds) == names
    assert sum(map(float, seconds.values())) == pytest.approx(float(parts[1]), abs=0.5)
    (folder,) = (tmp_path / "a run/launches").iterdir()
    facts = json.loads((folder / "launch.json").read_text())
    assert facts["launcher"]["ranks_per_node"] == 2 and facts["packages"]["torch"]
    script = folder / "run.sh"
    assert f"are started by {script}" in done.stdout
    script.write_text(script.read_text().replace("stop_at_step=2", "stop_at_step=3"))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    again = subprocess.run([script], capture_output=True, text=True, timeout=100, cwd="/", env=environment)
    assert again.returncode == 0 and "continues after step 2" in again.stderr, again.stderr[-3000:]
