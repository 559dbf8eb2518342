"""The training loop in one process: what a run learns, logs, validates, and how it stops."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dla_train.config import Config, ConfigError
from dla_train.data.errors import DataError
from dla_train.models.build import build_model
from dla_train.train import TrainingDiverged, train
from tests.train.runs import numbers_of, tensors_of

MakeConfig = Callable[..., Config]


def losses(config: Config) -> list[float]:
    train(config)
    return [loss for _, loss in numbers_of(config.run_dir, "loss")]


def test_the_loss_falls_well_below_that_of_a_uniform_guess(tiny: MakeConfig) -> None:
    result = train(tiny("train.steps=30", "train.validation_batches=2"))
    assert result.step == 30
    assert result.loss is not None and result.loss < 0.5 * math.log(320)
    assert result.validation is not None and result.validation.loss < 0.6 * math.log(320)


@pytest.mark.parametrize("changes", [["model.backbone=mamba2"], ["model.backbone=attention", "memory=none"]])
def test_other_mixers_train_in_the_same_loop(tiny: MakeConfig, changes: list[str]) -> None:
    conv = ["model.conv_width=0"] if "memory=none" in changes else []
    values = losses(tiny(*changes, *conv))
    assert values[-1] < values[0] - 1


def test_micro_batches_of_any_size_give_the_same_run(tiny: MakeConfig, tmp_path: Path) -> None:
    """Documents differ in length, so a mean of micro-batch means would not agree."""
    runs = [losses(tiny(f"train.micro_batch_rows={rows}", f"run_dir={tmp_path}/{rows}")) for rows in (1, 4, 8)]
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[2]), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(runs[1]), torch.tensor(runs[2]), rtol=1e-5, atol=0)


def test_recomputation_changes_no_bit(tiny: MakeConfig, tmp_path: Path) -> None:
    kept = losses(tiny())
    assert losses(tiny("train.recompute=true", f"run_dir={tmp_path}/recompute")) == kept


def test_reading_threads_change_no_bit(tiny: MakeConfig, tmp_path: Path) -> None:
    assert losses(tiny()) == losses(tiny("data.loader_workers=2", f"run_dir={tmp_path}/threads"))


def test_the_seed_changes_the_run_and_the_same_seed_repeats_it(tiny: MakeConfig, tmp_path: Path) -> None:
    first = losses(tiny("seed=1"))
    assert losses(tiny("seed=1", f"run_dir={tmp_path}/again")) == first
    assert losses(tiny("seed=2", f"run_dir={tmp_path}/other")) != first


def test_z_loss_is_logged_apart_and_changes_the_gradient(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny("optim.z_loss=0.1"))
    train(tiny(f"run_dir={tmp_path}/plain"))
    with_z, plain = (numbers_of(tmp_path / name, "loss", "grad_norm") for name in ("run", "plain"))
    assert with_z[0][1] == plain[0][1] and with_z[0][2] != plain[0][2]
    assert all(z > 0 for _, z in numbers_of(tmp_path / "run", "z_loss"))
    assert numbers_of(tmp_path / "plain", "z_loss") == []


def test_clipping_limits_the_update_and_not_the_logged_norm(tiny: MakeConfig, tmp_path: Path) -> None:
    """With eps 1, AdamW's step is proportional to the gradient, so a clipped one is a small one."""
    plain = ["optim.eps=1", "optim.lr=0.3", "optim.weight_decay=0", "optim.warmup_steps=0", "train.steps=4"]
    train(tiny(*plain, "optim.clip_norm=1e-6"))
    train(tiny(*plain, "optim.clip_norm=0", f"run_dir={tmp_path}/free"))
    clipped, free = (tensors_of(tmp_path / name, 4)["model/embedding.weight"] for name in ("run", "free"))
    start = build_model(tiny(), "cpu").state_dict()["embedding.weight"]
    assert 0 < (clipped - start).norm() < 1e-4 * (free - start).norm()
    first = [numbers_of(tmp_path / name, "grad_norm")[0] for name in ("run", "free")]
    assert first[0] == first[1]


def test_every_logged_step_has_its_numbers(tiny: MakeConfig) -> None:
    config = tiny("logging.interval_steps=3", "logging.peak_tflops=1")
    train(config)
    names = (
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "memory_bytes",
        "boundary_rate",
        "live_slots",
        "tau",
    )
    times = ("seconds", "seconds_data", "seconds_forward", "seconds_backward", "seconds_step", "overhead")
    lines = numbers_of(config.run_dir, *names, *times)
    assert [line[0] for line in lines] == [1, 3, 6, 8]
    assert all(math.isfinite(value) for line in lines for value in line)


def test_validation_comes_at_its_interval_and_at_the_end(tiny: MakeConfig) -> None:
    config = tiny("train.validation_batches=1", "train.validation_interval_steps=3")
    train(config)
    validations = numbers_of(config.run_dir, "validation_loss", "validation_bits_per_byte")
    assert [step for step, _, _ in validations] == [3, 6, 8]


def test_validation_does_not_disturb_the_run(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny("memory=dla_rate"))
    often = ["train.validation_batches=2", "train.validation_interval_steps=1"]
    train(tiny("memory=dla_rate", *often, f"run_dir={tmp_path}/often"))
    names = ("loss", "boundary_rate", "live_slots", "tau")
    assert numbers_of(tmp_path / "run", *names) == numbers_of(tmp_path / "often", *names)


def test_validations_change_no_bit_of_the_weights_also_where_the_run_is_resumed(
    tiny: MakeConfig, tmp_path: Path
) -> None:
    plain = tiny("memory=dla_rate", "memory.capacity_rule=random")
    train(plain)
    often = ["train.validation_batches=2", "train.validation_interval_steps=1", f"run_dir={tmp_path}/often"]
    for stop in (3, 8):
        train(tiny("memory=dla_rate", "memory.capacity_rule=random", *often, f"train.stop_at_step={stop}"))
    assert len(numbers_of(tmp_path / "often", "validation_gate_gap")) == 8
    without, validated = tensors_of(plain.run_dir, 8), tensors_of(tmp_path / "often", 8)
    assert without.keys() == validated.keys()
    assert [name for name in without if not torch.equal(without[name], validated[name])] == []


def test_the_gate_temperature_follows_its_schedule(tiny: MakeConfig, tmp_path: Path) -> None:
    constant = losses(tiny())
    falling = losses(tiny("memory.gate_temperature_final=0.01", f"run_dir={tmp_path}/falling"))
    assert falling[0] == constant[0] and falling[-1] != constant[-1]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(tiny: MakeConfig) -> None:
    config = tiny("optim.lr=1e30", "optim.clip_norm=0", "optim.warmup_steps=0", "checkpoint.interval_steps=1")
    with pytest.raises(TrainingDiverged, match=r"4 steps in a row .*max_rewinds=3.*optim.lr=1e\+30"):
        train(config)


def test_bad_input_is_an_error_before_anything_is_written(tiny: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        train(tiny(f"data.train=[{tmp_path}/absent]"))
    with pytest.raises(DataError, match="vocab"):
        train(tiny("model.vocab_size=200"))
    with pytest.raises(ConfigError, match="train.global_batch_rows=9"):
        train(tiny("train.global_batch_rows=9"))
    assert not (tmp_path / "run").exists()


def test_the_run_directory_holds_the_configuration_the_metrics_and_one_checkpoint(tiny: MakeConfig) -> None:
    config = tiny()
    train(config)
    names = sorted(path.relative_to(config.run_dir).as_posix() for path in Path(config.run_dir).rglob("*"))
    assert names == [
        "checkpoints",
        "checkpoints/step_00000008",
        "checkpoints/step_00000008/COMPLETE",
        "checkpoints/step_00000008/manifest.json",
        "checkpoints/step_00000008/tensors",
        "checkpoints/step_00000008/tensors/model-00000-000.safetensors",
        "checkpoints/step_00000008/tensors/optim-00000-000.safetensors",
        "checkpoints/step_00000008/tensors/rng-00000-000.safetensors",
        "checkpoints/step_00000008/trainer.json",
        "config.yaml",
        "memory.jsonl",
        "metrics.jsonl",
        "run.json",
        "status.json",
    ]
    assert json.loads((Path(config.run_dir) / "run.json").read_text())["name"] == "tiny"
