"""Checkpoints exist only when complete, are of this model, and continue this run; a run directory holds one run."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dla_train.checkpoint import Checkpointer, CheckpointError, RunDirectoryError, complete_steps
from dla_train.checkpoint.folders import MARKER, checkpoint_folder, remove_incomplete, remove_old
from dla_train.config import Config
from dla_train.evaluate.loading import build_model, load_model
from dla_train.parallel.mesh import Mesh
from dla_train.train import train
from tests.train.runs import TINY, numbers_of, run_python, tensors_of

MakeConfig = Callable[..., Config]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder with complete checkpoints of steps 1 to 3."""
    for step in (1, 2, 3):
        folder = checkpoint_folder(tmp_path, step)
        folder.mkdir()
        (folder / "data").write_bytes(b"x" * step)
        (folder / MARKER).write_text(json.dumps({"step": step, "files": {"data": step}}))
    yield tmp_path


def test_a_folder_without_its_marker_does_not_count_and_is_cleaned_away(root: Path) -> None:
    (checkpoint_folder(root, 3) / MARKER).unlink()
    (root / "step_00000004.tmp").mkdir()
    assert complete_steps(root) == [1, 2]
    assert remove_incomplete(root) == ["step_00000003", "step_00000004.tmp"]
    assert sorted(path.name for path in root.iterdir()) == ["step_00000001", "step_00000002"]


def test_a_truncated_file_makes_a_checkpoint_damaged_and_ignored_but_kept(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint_folder(root, 3) / "data").write_bytes(b"xx")
    assert complete_steps(root) == [1, 2]
    assert "step_00000003 is damaged" in caplog.text
    assert remove_incomplete(root) == [] and checkpoint_folder(root, 3).is_dir()


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3]), (1, [3]), (2, [2, 3]), (9, [1, 2, 3])])
def test_the_newest_checkpoints_are_kept(root: Path, keep: int, left: list[int]) -> None:
    remove_old(root, keep)
    assert complete_steps(root) == left


def test_checkpoints_come_at_their_interval_and_at_the_end(tiny: MakeConfig) -> None:
    config = tiny("checkpoint.interval_steps=3", "checkpoint.keep_last=0")
    train(config)
    assert complete_steps(Path(config.run_dir) / "checkpoints") == [3, 6, 8]


def test_a_run_resumed_in_a_new_process_equals_the_whole_run_bit_for_bit(
    tiny: MakeConfig, corpus: list[str], tmp_path: Path
) -> None:
    """Over the edge of an epoch, twice, the second time from an older checkpoint with later metrics already written."""
    names = ("loss", "grad_norm", "lr", "boundary_rate", "live_slots", "tau")
    train(tiny("memory=dla_rate", f"run_dir={tmp_path}/whole"))
    train(tiny("memory=dla_rate", "train.stop_at_step=3"))
    train(tiny("memory=dla_rate", "train.stop_at_step=6"))
    shutil.rmtree(checkpoint_folder(tmp_path / "run/checkpoints", 6))
    overrides = [*TINY, *corpus, "memory=dla_rate", f"run_dir={tmp_path}/run", "train.stop_at_step=7"]
    done = run_python(["-m", "dla_train.train", *overrides])
    assert done.returncode == 0, done.stderr
    assert "continues after step 3" in done.stderr
    train(tiny("memory=dla_rate"))
    assert numbers_of(tmp_path / "run", *names) == numbers_of(tmp_path / "whole", *names)
    whole, resumed = tensors_of(tmp_path / "whole", 8), tensors_of(tmp_path / "run", 8)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_the_test_corpus_makes_the_resumed_run_cross_an_epoch(tiny: MakeConfig) -> None:
    config = tiny()
    train(config)
    folder = checkpoint_folder(Path(config.run_dir) / "checkpoints", 8)
    assert json.loads((folder / "trainer.json").read_text())["data"]["sources"]["train"]["epoch"] >= 1


def test_a_half_written_checkpoint_is_passed_over_for_the_last_complete_one(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny(f"run_dir={tmp_path}/whole"))
    train(tiny("checkpoint.interval_steps=2", "checkpoint.keep_last=0", "train.stop_at_step=4"))
    (checkpoint_folder(tmp_path / "run/checkpoints", 4) / MARKER).unlink()
    (tmp_path / "run/checkpoints/step_00000006.tmp").mkdir()
    train(tiny())
    assert numbers_of(tmp_path / "run", "loss") == numbers_of(tmp_path / "whole", "loss")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_00000002", "step_00000008"]


def test_starting_a_finished_run_again_changes_nothing(tiny: MakeConfig) -> None:
    config = tiny()
    train(config)
    before = {path: path.read_bytes() for path in Path(config.run_dir, "checkpoints").rglob("*") if path.is_file()}
    lines = Path(config.run_dir, "metrics.jsonl").read_text()
    assert train(config).step == 8
    assert {path: path.read_bytes() for path in before} == before
    assert Path(config.run_dir, "metrics.jsonl").read_text() == lines


DIFFERENT = {
    "model": (["model.width=64"], ["model.width is 32 there and 64 here"]),
    "memory": (["memory.capacity=8"], ["memory.capacity is 30 there and 8 here"]),
    "optimizer": (["optim.lr=1e-3"], ["optim.lr is 0.01 there and 0.001 here"]),
    "seed": (["seed=5"], ["seed is 0 there and 5 here", "data fingerprint"]),
    "batch": (["train.global_batch_rows=4"], ["train.global_batch_rows is 8 there and 4 here"]),
    "length": (["train.steps=9"], ["train.steps is 8 there and 9 here"]),
    "compute type": (["train.dtype=bfloat16"], ["train.dtype is float32 there and bfloat16 here"]),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_directory_of_another_run_is_refused_and_left_alone(tiny: MakeConfig, tmp_path: Path, case: str) -> None:
    train(tiny("train.stop_at_step=1"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    overrides, words = DIFFERENT[case]
    with pytest.raises(RunDirectoryError) as caught:
        train(tiny(*overrides))
    for word in ["holds another run, tiny", "Choose another run_dir", *words]:
        assert word in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_settings_that_do_not_make_another_run_may_change(tiny: MakeConfig) -> None:
    train(tiny("train.stop_at_step=4"))
    free = ["train.micro_batch_rows=8", "memory.chunk_tokens=16", "train.validation_batches=1", "name=other"]
    assert train(tiny(*free, "checkpoint.keep_last=0", "train.recompute=true")).step == 8


def test_resume_never_and_required_are_kept(tiny: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="checkpoint.resume=required, but .* holds no run"):
        train(tiny("checkpoint.resume=required"))
    assert not (tmp_path / "run").exists()
    train(tiny("checkpoint.resume=never", "train.stop_at_step=1"))
    with pytest.raises(RunDirectoryError, match="checkpoint.resume=never"):
        train(tiny("checkpoint.resume=never"))
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        train(tiny("checkpoint.resume=required"))


def test_a_directory_with_metrics_of_an_unknown_run_is_refused(tiny: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("precious\n")
    with pytest.raises(RunDirectoryError, match=r"metrics.jsonl but no run.json"):
        train(tiny())
    assert (tmp_path / "run/metrics.jsonl").read_text() == "precious\n"
    with pytest.raises(RunDirectoryError, match="is a file"):
        train(tiny(f"run_dir={tmp_path}/run/metrics.jsonl"))


def test_a_checkpoint_of_another_model_names_the_first_differences(tiny: MakeConfig, tmp_path: Path) -> None:
    """The identity file says the same run, as after copying checkpoints by hand."""
    train(tiny("train.stop_at_step=1"))
    train(tiny("model.mlp_width=64", "train.stop_at_step=1", f"run_dir={tmp_path}/wide"))
    shutil.rmtree(tmp_path / "run/checkpoints")
    shutil.copytree(tmp_path / "wide/checkpoints", tmp_path / "run/checkpoints")
    with pytest.raises(CheckpointError) as caught:
        train(tiny())
    message = str(caught.value)
    assert "model/blocks.0.mlp.down.weight is [32, 64] there and [32, 48] here" in message and "more" in message
    assert numbers_of(tmp_path / "run", "loss")[-1][0] == 1


class OneTensor:
    """The least that a checkpoint can hold."""

    def __init__(self) -> None:
        self.value, self.steps = torch.arange(3.0), 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"model/value": (3,)}

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        yield "model/value", self.value

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        self.value, self.steps = state["model/value"], steps


def test_the_random_state_goes_on_where_it_was(tiny: MakeConfig) -> None:
    config, engine = tiny(), OneTensor()
    with Mesh.start(config) as mesh:
        checkpointer = Checkpointer(config, mesh)
        torch.manual_seed(3)
        torch.rand(5)
        checkpointer.save(4, engine, {"tokens": 1})
        expected = torch.rand(5)
        torch.manual_seed(0)
        engine.value = torch.zeros(3)
        resumed = checkpointer.resume(engine)
    assert resumed is not None and (resumed.step, resumed.data, engine.steps) == (4, {"tokens": 1}, 4)
    assert torch.equal(torch.rand(5), expected) and torch.equal(engine.value, torch.arange(3.0))


def test_a_save_that_crashes_leaves_the_older_checkpoint_in_charge(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, engine = tiny(), OneTensor()

    def full_disk(folder: Path, tensors: dict[str, Tensor]) -> None:
        raise OSError("no space left on device")

    with Mesh.start(config) as mesh:
        checkpointer = Checkpointer(config, mesh)
        checkpointer.save(2, engine, {})
        with monkeypatch.context() as patch:
            patch.setattr("dla_train.checkpoint.state.write_tensors", full_disk)
            with pytest.raises(OSError, match="no space"):
                checkpointer.save(4, engine, {})
        assert complete_steps(checkpointer.root) == [2]
        checkpointer.save(4, engine, {})
        assert complete_steps(checkpointer.root) == [2, 4]
        assert not list(checkpointer.root.glob("*.tmp"))


def test_a_loaded_model_is_the_trained_one(tiny: MakeConfig) -> None:
    config = tiny("memory=dla_rate", "checkpoint.interval_steps=4", "checkpoint.keep_last=0")
    train(config)
    model, loaded_config, step = load_model(config.run_dir)
    assert step == 8 and loaded_config == config and not model.training
    stored = tensors_of(config.run_dir, 8)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[f"model/{name}"]), name
    fresh: Mapping[str, Tensor] = build_model(config, "cpu").state_dict()
    assert not torch.equal(model.state_dict()["embedding.weight"], fresh["embedding.weight"])
    assert load_model(config.run_dir, step=4)[2] == 4
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; choose from 4, 8"):
        load_model(config.run_dir, step=5)


def test_loading_from_nowhere_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        load_model(tmp_path)
