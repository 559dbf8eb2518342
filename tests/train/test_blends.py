"""Training on a blend that changes: exact resume over a change of blend and context, and what is recorded of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dla_train.checkpoint.folders import checkpoint_folder
from dla_train.config import Config
from dla_train.data.errors import DataError
from dla_train.train import train
from tests.train.runs import numbers_of

MakeConfig = Callable[..., Config]
STEP = 8 * 32  # tokens


@pytest.fixture
def blend(corpus: list[str]) -> list[str]:
    """Overrides: the training and the held-out text as two sources."""
    paths = dict(override.split("=", 1) for override in corpus)
    first, second = paths["data.train"].strip("[]"), paths["data.validation"].strip("[]")
    return [f"data.train=[{{name: a, prefixes: {first}}}, {{name: b, prefixes: {second}}}]"]


FIRST = "{start_tokens: 0, weights: {a: 1, b: 0}, context_tokens: 8}"
SECOND = f"{{start_tokens: {2 * STEP}, weights: {{a: 3, b: 1}}}}"
PHASES = f"data.phases=[{FIRST}, {SECOND}]"
ADDED = f"data.phases=[{FIRST}, {SECOND}, {{start_tokens: {6 * STEP}, weights: {{b: 1}}}}]"


def test_a_resumed_run_over_phases_equals_one_that_was_not_stopped(
    tiny: MakeConfig, blend: list[str], tmp_path: Path
) -> None:
    train(tiny(*blend, ADDED, f"run_dir={tmp_path}/whole"))
    train(tiny(*blend, PHASES, "train.stop_at_step=1"))
    train(tiny(*blend, PHASES, "train.stop_at_step=5"))
    train(tiny(*blend, ADDED))  # the last phase was added later
    names = ("loss", "tokens/a", "tokens/b", "epochs/a", "epochs/b")
    assert numbers_of(tmp_path / "run", *names) == numbers_of(tmp_path / "whole", *names)
    ledger = {step: (a, b) for step, a, b in numbers_of(tmp_path / "run", "tokens/a", "tokens/b")}
    assert (ledger[2], ledger[6], ledger[8]) == ((2 * STEP, 0), (5 * STEP, STEP), (5 * STEP, 3 * STEP))


def test_best_fit_rows_train(tiny: MakeConfig, blend: list[str]) -> None:
    config = tiny(*blend, "data.packing=best_fit", "data.phases=[{start_tokens: 0, weights: {a: 1, b: 1}}]")
    result = train(config)
    losses = [loss for _, loss in numbers_of(config.run_dir, "loss")]
    assert result.step == 8 and losses[-1] < losses[0] - 1


def test_a_changed_past_is_refused_before_anything_is_written_and_recorded_if_allowed(
    tiny: MakeConfig, blend: list[str], tmp_path: Path
) -> None:
    train(tiny(*blend, PHASES, "train.stop_at_step=4"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    changed = PHASES.replace("{a: 3, b: 1}", "{a: 1, b: 1}")
    with pytest.raises(DataError, match=r"past phase 1 was from step 2 with weights a 3/4, b 1/4"):
        train(tiny(*blend, changed))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert train(tiny(*blend, changed, "data.allow_changed=true")).step == 8
    trainer = json.loads((checkpoint_folder(tmp_path / "run/checkpoints", 8) / "trainer.json").read_text())
    assert trainer["data"]["changes"][0]["tokens"] == 4 * STEP
