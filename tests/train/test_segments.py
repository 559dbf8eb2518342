"""Training on rows in segments: config rules, exact resume, validation on whole memory, every mistake named."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dla_train.config import Config, ConfigError
from dla_train.config_rules import validate
from dla_train.models import LanguageModel
from dla_train.train import train
from tests.train.runs import TINY, numbers_of, run_training

MakeConfig = Callable[..., Config]
IN_SEGMENTS = ("train.segment_tokens=8", "train.validation_batches=2", "train.validation_interval_steps=4")


def test_the_first_loss_and_held_out_losses_are_those_of_whole_rows(tiny: MakeConfig, tmp_path: Path) -> None:
    """With a learning rate of 0: gradients differ, the numbers of a forward pass do not."""
    bands = "train.validation_band_edges_tokens=[8,16]"
    whole = ("optim.lr=1e-30", "train.validation_batches=2", "train.validation_interval_steps=4", bands)
    train(tiny(*whole, f"run_dir={tmp_path}/whole"))
    train(tiny(*whole, "train.segment_tokens=8"))
    for name in ("loss", "validation_loss", "validation_soft_loss", "validation_loss_8_16", "validation_loss_16_32"):
        expected, found = numbers_of(tmp_path / "whole", name), numbers_of(tmp_path / "run", name)
        assert found and [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert numbers_of(tmp_path / "whole", "grad_norm") != numbers_of(tmp_path / "run", "grad_norm")


def test_a_resumed_run_in_segments_equals_one_that_was_not_stopped(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny(*IN_SEGMENTS, f"run_dir={tmp_path}/whole"))
    train(tiny(*IN_SEGMENTS, "train.stop_at_step=3"))
    train(tiny(*IN_SEGMENTS))
    names = ("loss", "grad_norm")
    assert numbers_of(tmp_path / "run", *names) == numbers_of(tmp_path / "whole", *names)
    losses = [loss for _, loss in numbers_of(tmp_path / "run", "loss")]
    assert losses[-1] < losses[0] - 0.3


def test_divided_runs_in_segments_equal_one_rank(tiny: MakeConfig, corpus: list[str], tmp_path: Path) -> None:
    """In training and in validation, hard and soft, with recomputation."""
    layouts = {
        "data": (),
        "tensor": ("parallel.tensor=2", "parallel.sequence=true"),
        "context": ("parallel.context=2",),
        "zero": ("engine=deepspeed", "engine.zero_stage=3", "train.recompute=true"),
    }
    common = (*IN_SEGMENTS, "train.steps=4", "train.validation_band_edges_tokens=[8]")
    train(tiny(*common, f"run_dir={tmp_path}/one"))
    runs = [[*TINY, *corpus, *common, *own, f"run_dir={tmp_path}/{name}"] for name, own in layouts.items()]
    run_training(tmp_path / "spec.json", runs, ranks=2)
    trained, validated = ("loss", "grad_norm"), ("validation_loss", "validation_soft_loss", "validation_loss_8_32")
    for name in layouts:
        for numbers in (trained, validated):
            expected, found = (torch.tensor(numbers_of(tmp_path / run, *numbers)) for run in ("one", name))
            torch.testing.assert_close(
                found, expected, rtol=2e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_step_in_segments_that_breaks_is_left_out_and_explained(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The third segment of the second step gives a loss that is no number, and gives it again when it is looked at."""
    real, calls = LanguageModel.token_loss, [0]

    def broken(self: LanguageModel, logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, ...]:
        nats, partition, count = real(self, logits, targets, z_loss)
        calls[0] += 1
        return (nats * float("nan") if calls[0] in (11, 19) else nats), partition, count

    monkeypatch.setattr(LanguageModel, "token_loss", broken)
    with caplog.at_level(logging.WARNING, logger="dla_train"):
        train(tiny("train.segment_tokens=8", "train.steps=3"))
    said = [record.message for record in caplog.records if "is left out" in record.message]
    assert len(said) == 1 and said[0].startswith("step 2 is left out") and said[0].endswith("rank 0: the loss")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.segment_tokens=32"], "is no shorter than the longest row, of 32 tokens; leave it at 0"),
        (["train.segment_tokens=12"], "does not divide rows of 32 tokens"),
        (["train.segment_tokens=-1"], "train.segment_tokens=-1"),
        (
            ["model.backbone=attention", "model.conv_width=0", "memory=none", "train.segment_tokens=8"],
            "model.backbone=attention has none",
        ),
        (["train.segment_tokens=8", "memory.chunk_tokens=32"], "is shorter than memory.chunk_tokens=32"),
        (["train.segment_tokens=1", "parallel.context=2"], "is not divisible by the 2 ranks along time"),
        (
            ["train.segment_tokens=16", "data.phases=[{start_tokens: 0, context_tokens: 8}, {start_tokens: 512}]"],
            "",
        ),
    ],
)
def test_segments_that_cannot_be_are_refused(tiny: MakeConfig, overrides: list[str], message: str) -> None:
    if not message:
        validate(tiny(*overrides), 1)
        return
    with pytest.raises(ConfigError, match=message):
        validate(tiny(*overrides), 2 if "parallel.context=2" in overrides else 1)
