"""Looks during training change no bit of it, come when due, and are the same on every layout and after a resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dla_train.config import Config, ConfigError
from dla_train.config_rules import validate
from dla_train.run_log import HEADS_FILE
from dla_train.train import train
from tests.train.runs import TINY, numbers_of, run_training, tensors_of

MakeConfig = Callable[..., Config]
SHORT = ("train.steps=4", "memory.capacity=4", "memory.tau=1.2")


def looks_of(run: Path) -> list[dict[str, Any]]:
    """The lines of memory.jsonl."""
    return [json.loads(line) for line in (run / HEADS_FILE).read_text().splitlines()]


@pytest.mark.parametrize("options", [(), ("train.recompute=true",), ("train.segment_tokens=8", "memory=dla_rate")])
def test_looking_changes_no_bit_of_a_training(tiny: MakeConfig, tmp_path: Path, options: tuple[str, ...]) -> None:
    for interval in (0, 1):
        train(tiny(*SHORT, *options, f"logging.memory_interval_steps={interval}", f"run_dir={tmp_path}/{interval}"))
    for names in (("loss", "grad_norm"), ("boundary_rate", "live_slots", "tau")):
        assert numbers_of(tmp_path / "0", *names) == numbers_of(tmp_path / "1", *names)
    expected, found = (tensors_of(tmp_path / run, 4) for run in ("0", "1"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert not (tmp_path / "0" / HEADS_FILE).exists() and not numbers_of(tmp_path / "0", "memory/live_slots")
    assert [step for step, _ in numbers_of(tmp_path / "1", "memory/live_slots")] == [1, 2, 3, 4]


def test_looks_come_at_multiples_of_their_interval_in_the_first_micro_batch(tiny: MakeConfig, tmp_path: Path) -> None:
    """Of 8 rows in micro-batches of 4, and whether or not the step has a log line."""
    train(
        tiny(
            *SHORT,
            "train.steps=7",
            "logging.memory_interval_steps=3",
            "logging.interval_steps=5",
            "logging=tensorboard",
        )
    )
    lines = looks_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6]
    assert [step for step, _ in numbers_of(tmp_path / "run", "memory/boundary_rate/layer_1")] == [3, 6]
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("memory/read_evenness/layer_0")] == [3, 6]
    of_tracker = events.Histograms("memory/score_histogram/layer_1")
    assert [event.step for event in of_tracker] == [3, 6]
    of_heads = [sum(head["score_histogram"]) for head in lines[1]["heads"] if head["layer"] == 1]
    assert of_tracker[1].histogram_value.num == sum(of_heads)
    decisions = [sum(head["score_histogram"]) for head in lines[0]["heads"]]
    assert len(decisions) == 4 and min(decisions) > 4 * 32 * 0.7 and max(decisions) <= 4 * 31


def test_a_resumed_run_leaves_the_looks_of_one_that_was_not_stopped(tiny: MakeConfig, tmp_path: Path) -> None:
    every = "logging.memory_interval_steps=1"
    train(tiny(*SHORT, every, f"run_dir={tmp_path}/whole"))
    train(tiny(*SHORT, every, "train.stop_at_step=2", "checkpoint.interval_steps=2"))
    with (tmp_path / "run" / HEADS_FILE).open("a") as file:
        file.write(json.dumps({"step": 3, "heads": "of a start that was killed"}) + "\n")
    train(tiny(*SHORT, every))
    assert looks_of(tmp_path / "run") == looks_of(tmp_path / "whole")


def test_divided_runs_see_what_one_rank_sees(tiny: MakeConfig, corpus: list[str], tmp_path: Path) -> None:
    """Every head, by its number in the whole model; all rows are in the first micro-batches."""
    layouts = {
        "data": ("train.micro_batch_rows=4",),
        "tensor": ("parallel.tensor=2", "parallel.sequence=true"),
        "context": ("parallel.context=2", "train.segment_tokens=16"),
        "zero": ("engine=deepspeed", "engine.zero_stage=3", "train.micro_batch_rows=4", "train.recompute=true"),
    }
    common = (*SHORT, "train.steps=2", "train.micro_batch_rows=8", "logging.memory_interval_steps=1")
    common = (*common, "memory.tau_control=learned", "memory.gain_init=0.5")
    train(tiny(*common, f"run_dir={tmp_path}/one"))
    runs = [[*TINY, *corpus, *common, *own, f"run_dir={tmp_path}/{name}"] for name, own in layouts.items()]
    run_training(tmp_path / "spec.json", runs, ranks=2)
    (expected, _) = looks_of(tmp_path / "one")
    assert len({head["score"] for head in expected["heads"]}) == 4
    for name in layouts:
        (found, _) = looks_of(tmp_path / name)
        for head, wanted in zip(found["heads"], expected["heads"], strict=True):
            assert head.keys() == wanted.keys()
            for key, value in wanted.items():
                assert head[key] == pytest.approx(value, rel=2e-3, abs=1e-4), (name, key)
        numbers = ("memory/boundary_rate", "memory/read_entropy/layer_1", "memory/gate_distance", "memory/tau")
        (one, *_), (divided, *_) = (numbers_of(tmp_path / run, *numbers) for run in ("one", name))
        assert divided == pytest.approx(one, rel=1e-3)


def test_softmax_attention_has_no_looks(tiny: MakeConfig, tmp_path: Path) -> None:
    attention = ("model.backbone=attention", "model.conv_width=0", "memory=none")
    train(tiny("train.steps=2", "logging.memory_interval_steps=1", *attention))
    assert not (tmp_path / "run" / HEADS_FILE).exists()


def test_a_negative_interval_is_refused(tiny: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="logging.memory_interval_steps=-1 is below 0"):
        validate(tiny("logging.memory_interval_steps=-1"))
