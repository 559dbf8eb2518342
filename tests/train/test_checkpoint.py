"""Checkpoints exist only when complete, are of this model, and continue this run; a run directory holds one run."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dla_train.checkpoint import saving
from dla_train.checkpoint.errors import CheckpointError, RunDirectoryError
from dla_train.checkpoint.folders import checkpoint_folder, complete_steps
from dla_train.checkpoint.manifest import MARKER
from dla_train.checkpoint.run_lock import RunLock
from dla_train.config import Config
from dla_train.evaluate.loading import load_model
from dla_train.models.build import build_model
from dla_train.resilience.exit_codes import write_status
from dla_train.train import train
from tests.train.runs import TINY, numbers_of, run_python, run_training, tensors_of

MakeConfig = Callable[..., Config]


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
    assert "has done train.stop_at_step=7 of 8 steps; without that setting it goes on" in done.stderr
    train(tiny("memory=dla_rate"))
    assert numbers_of(tmp_path / "run", *names) == numbers_of(tmp_path / "whole", *names)
    whole, resumed = tensors_of(tmp_path / "whole", 8), tensors_of(tmp_path / "run", 8)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_saving_in_the_background_every_step_changes_no_bit_of_the_run_or_of_a_checkpoint(
    tiny: MakeConfig, tmp_path: Path
) -> None:
    """Each checkpoint written while training went on is the one of a run that stopped there, and is gone on from."""
    often = ["memory=dla_rate", "checkpoint.interval_steps=1", "checkpoint.keep_last=0"]
    train(tiny(*often, f"run_dir={tmp_path}/whole"))
    for step in (2, 5):
        train(tiny("memory=dla_rate", "checkpoint.asynchronous=false", f"train.stop_at_step={step}"))
        background, stopped = tensors_of(tmp_path / "whole", step), tensors_of(tmp_path / "run", step)
        assert background.keys() == stopped.keys()
        assert [name for name in stopped if not torch.equal(background[name], stopped[name])] == []
    for step in (7, 8):
        shutil.rmtree(checkpoint_folder(tmp_path / "whole/checkpoints", step))
    train(tiny("memory=dla_rate", f"run_dir={tmp_path}/whole"))
    train(tiny("memory=dla_rate"))
    names = ("loss", "grad_norm", "tau")
    assert numbers_of(tmp_path / "whole", *names) == numbers_of(tmp_path / "run", *names)


def test_the_number_of_loader_workers_may_change_from_start_to_start(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny(f"run_dir={tmp_path}/whole"))
    for step, workers in ((3, 2), (5, 0), (8, 3)):
        train(tiny(f"train.stop_at_step={step}", f"data.loader_workers={workers}"))
    names = ("loss", "grad_norm", "lr")
    assert numbers_of(tmp_path / "run", *names) == numbers_of(tmp_path / "whole", *names)
    whole, resumed = tensors_of(tmp_path / "whole", 8), tensors_of(tmp_path / "run", 8)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_a_run_goes_from_two_ranks_to_one_and_back_to_two(tiny: MakeConfig, corpus: list[str], tmp_path: Path) -> None:
    def start(step: int, ranks: int) -> None:
        overrides = [*TINY, *corpus, f"run_dir={tmp_path}/run", "checkpoint.keep_last=0", f"train.stop_at_step={step}"]
        run_training(tmp_path / "spec.json", [overrides], ranks=ranks)

    train(tiny(f"run_dir={tmp_path}/whole"))
    start(3, ranks=2)
    train(tiny("train.stop_at_step=5", "checkpoint.keep_last=0"))
    start(8, ranks=2)
    names = ("loss", "grad_norm", "lr")
    expected, actual = (torch.tensor(numbers_of(tmp_path / name, *names)) for name in ("whole", "run"))
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=0)  # gradients are summed in another order
    ranks = [{name for name in tensors_of(tmp_path / "run", step) if "rng" in name} for step in (3, 5, 8)]
    assert [len(names) for names in ranks] == [2, 1, 2]


def test_a_last_save_that_fails_is_an_error_and_one_in_between_is_not(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = saving.write_tensor_files
    failing = {2, 8}

    def full_disk(folder: Path, *arguments: Any) -> Any:
        if int(folder.name[5:13]) in failing:
            raise OSError("no space left on device")
        return written(folder, *arguments)

    monkeypatch.setattr(saving, "write_tensor_files", full_disk)
    with pytest.raises(CheckpointError, match="step 8 is not written: rank 0: no space left"):
        train(tiny("checkpoint.interval_steps=2", "checkpoint.keep_last=0"))
    assert complete_steps(tmp_path / "run/checkpoints") == [4, 6]
    failing.clear()
    assert train(tiny()).step == 8


def test_two_jobs_in_one_directory_are_refused_and_a_finished_one_leaves_no_lock(
    tiny: MakeConfig, tmp_path: Path
) -> None:
    train(tiny("train.stop_at_step=1"))
    assert not list((tmp_path / "run").glob("run.lock*"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    lock = RunLock(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="is being trained by process"):
        train(tiny())
    lock.release()
    assert {path: path.read_bytes() for path in before} == before
    assert train(tiny()).step == 8


def test_a_run_file_of_nonsense_is_an_error_and_stays(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny("train.stop_at_step=1"))
    for content in ("{", "[]", '{"name": "tiny"}'):
        (tmp_path / "run/run.json").write_text(content)
        with pytest.raises(RunDirectoryError, match=r"run\.json .*(copy|choose another)"):
            train(tiny())
        assert (tmp_path / "run/run.json").read_text() == content


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
    "policy": (["memory=single"], ["tiny: memory.policy is dla there and single here", "memory.capacity is 30 there"]),
    "optimizer": (["optim.lr=1e-3"], ["optim.lr is 0.01 there and 0.001 here"]),
    "seed": (["seed=5"], ["seed is 0 there and 5 here", "data fingerprint"]),
    "batch": (["train.global_batch_rows=4"], ["train.global_batch_rows is 8 there and 4 here"]),
    "length": (["train.steps=9"], ["train.steps is 8 there and 9 here"]),
    "packing": (["data.packing=best_fit"], ["data.packing is concatenate there and best_fit here; data fingerprint"]),
    "segments": (["train.segment_tokens=16"], ["train.segment_tokens is 0 there and 16 here"]),
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


FIXED = ("memory=fixed", "memory.read=slot", "memory.capacity=8")
LOG_LINEAR = ("memory=log_linear", "memory.read=slot", "memory.capacity=8", "memory.levels=8")


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (FIXED, LOG_LINEAR, "memory: memory.policy is fixed there and log_linear here"),
        (("memory.closed_slots=frozen",), (), "memory: memory.closed_slots is frozen there and transition here"),
        (("memory=single",), (), "memory: memory.policy is single there and dla here; memory.capacity is 1"),
    ],
)
def test_a_checkpoint_of_another_memory_is_refused_also_where_its_shapes_are_the_same(
    tiny: MakeConfig, tmp_path: Path, there: tuple[str, ...], here: tuple[str, ...], message: str
) -> None:
    train(tiny(*there, "train.stop_at_step=2", f"run_dir={tmp_path}/other"))
    train(tiny(*here, "train.stop_at_step=1"))
    shutil.rmtree(tmp_path / "run/checkpoints")
    shutil.copytree(tmp_path / "other/checkpoints", tmp_path / "run/checkpoints")
    with pytest.raises(CheckpointError, match=f"step_00000002 was trained with another model or {message}.*dla-export"):
        train(tiny(*here))
    assert complete_steps(tmp_path / "run/checkpoints") == [2]


def test_a_run_of_a_version_without_a_setting_goes_on_with_its_default_and_no_other(
    tiny: MakeConfig, tmp_path: Path
) -> None:
    train(tiny("train.stop_at_step=4"))
    path = tmp_path / "run/run.json"
    stored = json.loads(path.read_text())
    del stored["identity"]["memory.drift"], stored["identity"]["optim.eps"]
    path.write_text(json.dumps(stored))
    with pytest.raises(RunDirectoryError, match="memory.drift is token there and update here"):
        train(tiny("memory.drift=update"))
    assert train(tiny()).step == 8


def test_what_an_earlier_version_did_not_name_is_what_the_last_start_was_configured_with(
    tiny: MakeConfig, tmp_path: Path
) -> None:
    chosen = ("data.packing=best_fit", "train.segment_tokens=16")
    train(tiny(*chosen, "train.stop_at_step=4"))
    path = tmp_path / "run/run.json"
    stored = json.loads(path.read_text())
    del stored["identity"]["data.packing"], stored["identity"]["train.segment_tokens"]
    path.write_text(json.dumps(stored))
    with pytest.raises(RunDirectoryError, match="tiny: train.segment_tokens is 16 there and 0 here"):
        train(tiny(chosen[0]))
    assert train(tiny(*chosen)).step == 8


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


@pytest.mark.parametrize("state", ["finished", "running"])
def test_a_run_whose_checkpoints_are_gone_is_not_started_anew(tiny: MakeConfig, tmp_path: Path, state: str) -> None:
    train(tiny("train.stop_at_step=4"))
    shutil.rmtree(tmp_path / "run/checkpoints")
    write_status(tmp_path / "run", state, 4, None)
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=f"says {state}, with step 4 saved, but .* holds no checkpoint"):
        train(tiny())
    assert (tmp_path / "run/metrics.jsonl").read_text() == lines


@pytest.mark.parametrize(("state", "step"), [("running", 0), ("stopped", 0), ("diverged", 3)])
def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(
    tiny: MakeConfig, tmp_path: Path, state: str, step: int
) -> None:
    train(tiny("train.stop_at_step=4"))
    shutil.rmtree(tmp_path / "run/checkpoints")
    write_status(tmp_path / "run", state, step, None)
    assert train(tiny("train.stop_at_step=2")).step == 2


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
    assert "model.mlp_width is 64 there and 48 here" in message
    assert numbers_of(tmp_path / "run", "loss")[-1][0] == 1


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


def test_a_model_is_not_loaded_from_damaged_weights(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny())
    for kind, refused in (("optim", False), ("model", True)):
        path = checkpoint_folder(tmp_path / "run/checkpoints", 8) / f"tensors/{kind}-00000-000.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        if refused:
            with pytest.raises(CheckpointError, match="model-00000-000.safetensors has .* not those that were written"):
                load_model(tmp_path / "run")
        else:
            assert load_model(tmp_path / "run")[2] == 8  # moments are not read, so not hashed either


def test_loading_from_nowhere_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder /.*/misspelt$"):
        load_model(tmp_path / "misspelt")
