"""Two ranks write one checkpoint, agree on what became of it, and one rank or two go on from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dla_train.checkpoint.stored import StoredCheckpoint
from tests.checkpoint.small_runs import resumed_value
from tests.train.runs import ROOT, run_python

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_python([*launcher, str(ROOT / "tests/checkpoint/rank_worker.py"), str(folder)])
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def both(found: Found, key: str) -> Any:
    """What both ranks found."""
    assert found[0][key] == found[1][key]
    return found[0][key]


def test_both_ranks_learn_that_a_save_is_complete(found: Found) -> None:
    assert both(found, "finished") is None and both(found, "last complete") == 3


def test_a_rank_that_cannot_write_costs_the_checkpoint_and_every_rank_hears_the_cause(found: Found) -> None:
    assert both(found, "failed in between") == "rank 1: [Errno 28] No space left on device"
    message = both(found, "failed at the end")
    assert "step 5 is not written: rank 1: [Errno 28] No space left on device" in message
    assert both(found, "complete") == [3, 6]


def test_every_tensor_is_written_once_by_one_of_the_ranks(folder: Path) -> None:
    checkpoint = StoredCheckpoint(folder / "run/checkpoints/step_00000003")
    checkpoint.verify()
    parts = [name for name in checkpoint.manifest.files if "model" in name or "optim" in name]
    assert {name.split("-")[1] for name in parts} == {"00000", "00001"}
    tensors = checkpoint.tensors("model", "optim", "rng")
    assert set(tensors) == {"model/table", "model/scalar", "optim/table/exp_avg", "rng/0/cpu", "rng/1/cpu"}
    assert float(tensors["model/table"].max()) == 3.0


def test_each_rank_gets_its_own_random_state_back(found: Found, folder: Path) -> None:
    assert both(found, "random state went on")
    (damaged,) = folder.glob("run/checkpoints/*.damaged")
    states = StoredCheckpoint(damaged).tensors("rng")
    for rank in (0, 1):
        assert torch.equal(states[f"rng/{rank}/cpu"], torch.Generator().manual_seed(rank).get_state())


def test_damage_that_one_rank_finds_sends_both_to_the_older_checkpoint(found: Found) -> None:
    assert both(found, "resumed") == [6, 6.0]
    assert both(found, "resumed after damage") == [3, 3.0]


def test_a_directory_that_is_held_is_refused_on_every_rank(found: Found) -> None:
    assert "is being trained by process" in both(found, "second holder")


def test_one_rank_goes_on_from_two(found: Found, folder: Path) -> None:
    assert resumed_value(folder) == (3, 3.0)
