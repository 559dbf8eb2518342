"""An option of a group that an experiment's own settings would undo is refused, with the words that settle it."""

import subprocess
import sys
from pathlib import Path

import pytest

from dla_train.config import ConfigError
from dla_train.hydra_app import compose

OWN_EXPERIMENT = """# @package _global_
defaults:
  - override /checkpoint: often
  - _self_
name: own
memory: {capacity: 7}
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / "own.yaml").write_text(OWN_EXPERIMENT)
    command = [sys.executable, "-m", "dla_train.train", "--config-dir", str(folder), "experiment=own", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_an_option_that_the_experiment_undoes_names_both_mends(tmp_path: Path) -> None:
    ended = run(tmp_path, "memory=dla_rate_small")
    assert ended.returncode == 2
    assert "memory=dla_rate_small says memory.capacity=16, but experiment=own sets it to 7" in ended.stderr
    assert "add memory.capacity=16, or memory.capacity=7 to keep the experiment's" in ended.stderr


def test_an_option_of_the_users_own_folder_is_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "mine.yaml").write_text("defaults: [dla, _self_]\ncapacity: 5\n")
    assert "memory=mine says memory.capacity=5" in run(tmp_path, "memory=mine").stderr


@pytest.mark.parametrize("settled", ["memory.capacity=16", "memory.capacity=7"])
def test_a_word_about_the_value_itself_settles_it(tmp_path: Path, settled: str) -> None:
    ended = run(tmp_path, "memory=dla_rate_small", settled)
    assert ended.stderr.startswith("dla-train: error: train.steps"), "the next thing that is wrong"


@pytest.mark.parametrize("words", [["memory=single"], ["checkpoint=end"], ["checkpoint=interval", "logging=wandb"]])
def test_an_option_that_the_experiment_leaves_alone_is_taken(words: list[str]) -> None:
    config = compose(["experiment=quickstart", *words])
    assert (config.memory.policy, config.checkpoint.interval_steps) == {
        "memory=single": ("single", 100),
        "checkpoint=end": ("dla", 0),
        "checkpoint=interval": ("dla", 500),
    }[words[0]]


def test_of_an_option_given_twice_the_last_one_counts() -> None:
    words = ["memory=dla", "model=transformer_tiny", "memory=none", "experiment=upcycle", "experiment=quickstart"]
    assert compose(words).memory.policy == "none"


def test_the_model_of_a_folder_is_not_replaced_in_silence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.initial is not set"):
        compose(["experiment=upcycle", "model=mamba2_tiny", "data.train=[a]", "data.tokenizer=b"])
