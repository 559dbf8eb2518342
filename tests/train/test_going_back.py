"""A run that goes back passes over the data that led astray, for good, and is otherwise a run like any other."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from dla_train.config import Config
from dla_train.loop import Loop
from dla_train.resilience.exit_codes import DIVERGED, read_status
from dla_train.resilience.journal import Rewind, append_to_journal, data_step
from dla_train.train import TrainingDiverged, train
from tests.train.runs import numbers_of, tensors_of

MakeConfig = Callable[..., Config]
SPIKES = ("resilience=spikes", "resilience.spike_window_steps=8", "resilience.spike_patience_steps=2")
SETTINGS = ("train.steps=24", "checkpoint.interval_steps=4", "checkpoint.keep_last=0", *SPIKES)


def spoil(monkeypatch: pytest.MonkeyPatch, bad: Collection[int]) -> list[tuple[int, int]]:
    """Raise the losses of the data steps `bad`; returns (optimizer step, data step) as they are trained on."""
    trained: list[tuple[int, int]] = []
    step, losses = Loop._train_step, Loop._losses

    def train_step(loop: Loop, done: int, **options: Any) -> Any:
        trained.append((done + 1, data_step(done, loop.rewinds)))
        return step(loop, done, **options)

    def spoilt(loop: Loop, *arguments: Any) -> Any:
        nats, partition = losses(loop, *arguments)
        return nats + 1e5 * (trained[-1][1] in bad), partition

    monkeypatch.setattr(Loop, "_train_step", train_step)
    monkeypatch.setattr(Loop, "_losses", spoilt)
    return trained


def test_spikes_send_the_run_back_and_past_their_data(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = spoil(monkeypatch, {13, 14})
    assert train(tiny(*SETTINGS)).step == 24
    (entry,) = (json.loads(line) for line in (tmp_path / "run/journal.jsonl").read_text().splitlines())
    assert (entry["at_step"], entry["to_step"]) == (15, 12)
    assert (entry["from_data_step"], entry["until_data_step"]) == (13, 15)
    last = dict(trained)
    assert [last[step] for step in range(1, 25)] == [*range(13), *range(15, 26)]
    assert [line[0] for line in numbers_of(tmp_path / "run", "loss")] == list(range(1, 25))
    aside = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("*rewound"))
    assert aside == []  # no checkpoint was saved between the first spike and the return


def test_the_run_equals_one_that_never_met_the_data(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {13, 14})
    train(tiny(*SETTINGS))
    other = tmp_path / "other"
    train(tiny(*SETTINGS, f"run_dir={other}", "train.stop_at_step=12"))
    append_to_journal(other, Rewind(15, 12, 13, 15, "planned"))
    train(tiny(*SETTINGS, f"run_dir={other}"))
    names = ("loss", "grad_norm", "lr", "boundary_rate")
    assert numbers_of(tmp_path / "run", *names) == numbers_of(other, *names)
    expected, found = tensors_of(other, 24), tensors_of(tmp_path / "run", 24)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if not name.startswith("rng/"))


def test_a_resumed_run_obeys_the_journal(tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = spoil(monkeypatch, {13, 14})
    train(tiny(*SETTINGS, "train.stop_at_step=18"))
    trained.clear()
    train(tiny(*SETTINGS))
    assert trained == [(step, step + 1) for step in range(19, 25)]


def test_bad_data_after_the_return_is_passed_over_too_until_the_returns_are_used_up(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, range(13, 100))
    with pytest.raises(TrainingDiverged, match=r"resilience.max_rewinds=2 returns are used up; lower optim.lr"):
        train(tiny(*SETTINGS, "resilience.max_rewinds=2"))
    status = read_status(tmp_path / "run")
    assert status and (status["state"], status["exit_code"]) == ("diverged", DIVERGED)
    journal = [json.loads(line) for line in (tmp_path / "run/journal.jsonl").read_text().splitlines()]
    assert [(entry["from_data_step"], entry["until_data_step"]) for entry in journal] == [(13, 15), (15, 17)]


def test_a_return_without_a_checkpoint_to_return_to_ends_the_run(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {13, 14})
    with pytest.raises(TrainingDiverged, match="there is no checkpoint from before step 14"):
        train(tiny(*SETTINGS, "checkpoint.interval_steps=0"))


def test_a_journal_that_does_not_fit_the_checkpoint_is_refused(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny(*SETTINGS, "train.stop_at_step=12"))
    append_to_journal(tmp_path / "run", Rewind(9, 4, 5, 8, "of another run"))
    with pytest.raises(ValueError, match=r"read its data up to step 12, but by .*journal.jsonl it is 15"):
        train(tiny(*SETTINGS))


def test_a_resumed_run_tells_spikes_by_the_losses_before_it_was_stopped(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(*SETTINGS, "train.stop_at_step=12"))
    spoil(monkeypatch, {13, 14})
    assert train(tiny(*SETTINGS)).step == 24
    assert len((tmp_path / "run/journal.jsonl").read_text().splitlines()) == 1
