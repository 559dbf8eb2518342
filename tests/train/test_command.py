"""The command as a user starts it: plain, under torchrun, with mistakes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dla_train.config import Config, ConfigError
from dla_train.hydra_app import compose
from dla_train.parallel.mesh import Mesh, pick_device
from tests.train.runs import ROOT, TINY, numbers_of, run_python


def test_the_command_trains_with_a_progress_bar_and_writes_only_into_run_dir(corpus: list[str], tmp_path: Path) -> None:
    overrides = [*TINY, *corpus, f"run_dir={tmp_path}/run", "logging.progress=true", "train.validation_batches=1"]
    empty = tmp_path / "empty"
    empty.mkdir()
    done = run_python(["-m", "dla_train.train", *overrides], cwd=empty)
    assert done.returncode == 0, done.stderr
    assert "tiny starts: 0.0M parameters, gated_deltanet x dla" in done.stderr
    assert re.search(r"8/8 \[.*loss=\d\.\d+, tokens/s=", done.stderr)
    assert re.search(r"step 8: held-out loss \d\.\d+, \d\.\d+ bits per byte", done.stderr)
    assert list(empty.iterdir()) == [] and len(numbers_of(tmp_path / "run", "loss")) == 8


def test_a_mistake_in_the_data_is_one_paragraph_and_exit_code_2(corpus: list[str], tmp_path: Path) -> None:
    overrides = [*TINY, *corpus, f"run_dir={tmp_path}/run", f"data.train=[{tmp_path}/nowhere]"]
    done = run_python(["-m", "dla_train.train", *overrides])
    assert done.returncode == 2
    assert done.stderr.startswith("dla-train: error: ") and "nowhere" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_torchrun_script_trains_on_two_ranks_and_one_of_them_writes(corpus: list[str], tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "RANKS": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "launch/torchrun.sh"), *TINY, *corpus, f"run_dir={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tiny starts") == 1 and "2 rank(s) on cpu" in done.stderr
    assert len(numbers_of(tmp_path / "run", "loss")) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def tiny_config(*overrides: str) -> Config:
    return compose([*TINY, "run_dir=x", *overrides])


def test_a_single_process_needs_no_launcher_and_leaves_no_group_behind() -> None:
    with Mesh.start(tiny_config()) as mesh:
        assert (mesh.rank, mesh.size, mesh.is_writer) == (0, 1, True)
        values = torch.arange(3.0)
        assert torch.equal(mesh.sum(values), values) and mesh.sum(values) is not values
        assert mesh.max(2.5) == 2.5
        assert mesh.from_writer({"step": 3}) == {"step": 3} == mesh.on_writer(lambda: {"step": 3})
        with pytest.raises(ValueError, match="invalid literal"):
            mesh.on_writer(lambda: int("x"), (ValueError,))
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device is there")
def test_an_absent_device_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="train.device=cuda"):
        pick_device("cuda")
    with pytest.raises(ConfigError, match="parallel.backend=nccl"):
        Mesh.start(tiny_config("parallel.backend=nccl"))
