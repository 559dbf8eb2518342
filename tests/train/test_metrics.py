"""Where numbers go and how time and speed are counted."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dla_train import metrics
from dla_train.config import Config
from dla_train.metrics import PhaseClock
from dla_train.trackers import Histogram, JsonLines, TensorBoard, WeightsAndBiases, read_lines


def test_lines_after_the_resumed_step_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": float(step)}) + "\n" for step in (1, 2, 3, 4)))
    sink = JsonLines(path, resumed_step=2)
    sink.write(3, {"loss": 30.0})
    sink.close()
    assert read_lines(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]


def test_a_last_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1, "loss": 0.1}]


def test_floats_survive_the_file_exactly(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    sink.write(1, {"loss": 0.1 + 0.2})
    sink.close()
    assert read_lines(tmp_path / "metrics.jsonl")[0]["loss"] == 0.1 + 0.2


def test_phases_and_other_sum_to_the_step_and_overhead_is_what_the_model_did_not_take() -> None:
    clock = PhaseClock(torch.device("cpu"))
    clock.restart()
    for phase, seconds in (("data", 0.01), ("forward", 0.02), ("forward", 0.02), ("backward", 0.02), ("step", 0.01)):
        with clock.phase(phase):
            time.sleep(seconds)
    time.sleep(0.02)
    times = clock.end_step()
    parts = [times[f"seconds_{phase}"] for phase in (*metrics.PHASES, "other")]
    assert sum(parts) == pytest.approx(times["seconds"])
    assert times["seconds_forward"] >= 0.04 and times["seconds_other"] >= 0.02
    outside = times["seconds_data"] + times["seconds_other"]
    assert times["overhead"] == pytest.approx(outside / times["seconds"])
    following = clock.end_step()
    assert following["seconds_forward"] == 0.0 and following["seconds"] < 0.02


def test_what_the_loop_does_between_steps_is_overhead_unless_the_clock_is_restarted() -> None:
    clock = PhaseClock(torch.device("cpu"))
    clock.restart()
    clock.end_step()
    time.sleep(0.03)
    assert clock.end_step()["seconds"] >= 0.03
    time.sleep(0.03)
    clock.restart()
    assert clock.end_step()["seconds"] < 0.03


def test_mfu_is_useful_flops_over_the_peak_of_all_devices() -> None:
    # 1000 tokens/s x 1e9 FLOP = 1 TFLOP/s on 2 devices of 10 TFLOP/s
    assert metrics.model_flops_utilisation(1000, 1e9, 10, 2) == pytest.approx(0.05)


def test_the_peak_of_an_unknown_device_is_not_guessed() -> None:
    assert metrics.peak_tflops(0.0, torch.device("cpu")) is None
    assert metrics.peak_tflops(0.5, torch.device("cpu")) == 0.5


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path, resumed_step=0)
    sink.write(7, {"loss": 1.5})
    sink.write_histograms(7, {"ages": Histogram([0, 1, 3], [4, 2])})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 1.5)]
    ages = events.Histograms("ages")[0].histogram_value
    assert (ages.num, ages.sum, ages.bucket_limit, ages.bucket) == (6, 6, [1, 3], [4, 2])


def test_wandb_without_a_network_goes_offline_and_says_so(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    import wandb

    real_init, modes = wandb.init, []

    def unreachable(mode: str | None = None, **start: object) -> object:
        modes.append(mode)
        assert start["group"] == "a sweep"
        if mode is None:
            raise wandb.errors.CommError("no network")
        return real_init(mode=mode, **start)

    monkeypatch.setattr(wandb, "init", unreachable)
    config = tiny("logging.wandb=true", "logging.wandb_group=a sweep", f"run_dir={tmp_path}")
    with caplog.at_level(logging.WARNING, logger="dla_train"):
        sink = WeightsAndBiases(config)
    logged: dict[str, Any] = {}
    monkeypatch.setattr(sink._run, "log", lambda numbers, step: logged.update({"step": step, **numbers}))
    sink.write(1, {"loss": 1.0})
    sink.write_histograms(1, {"ages": Histogram([0, 1, 3], [4, 2])})
    sink.close()
    assert (logged["step"], logged["loss"]) == (1, 1.0)
    assert (logged["ages"].histogram, logged["ages"].bins) == ([4, 2], [0, 1, 3])
    assert modes == [None, "offline"]
    assert "offline" in caplog.text and "no network" in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*"))
