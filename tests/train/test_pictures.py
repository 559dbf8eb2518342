"""Levels and pictures of a run: unigram entropy, loss curve, merge map; and the quickstart that makes them."""

import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from dla_train.data.indexed import TokenFiles
from dla_train.data.tokenizer import load_tokenizer
from dla_train.evaluate.loss_curve import plot_loss_curve
from dla_train.evaluate.unigram import token_counts, unigram_entropy
from dla_train.inspect_memory.history import inspect_text
from dla_train.inspect_memory.merge_map import plot_merge_map
from dla_train.models.build import build_model
from dla_train.quickstart import main as quickstart
from dla_train.train import train
from tests.train.runs import run_python

TEXT = "line 3 adds 9 to 1\nGr\u00fc\u00dfe from line 4\n" * 3


def assert_picture(path: Path) -> None:
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 200 and pixels.shape[1] > 400
    assert pixels[..., :3].std() > 0.05, "the picture is blank"


@pytest.fixture
def model_and_tokenizer(tiny):
    config = tiny("memory.capacity=4", "memory.tau=1.0")
    return build_model(config, "cpu"), load_tokenizer(config.data.tokenizer)


def test_unigram_entropy_is_that_of_the_counted_tokens(tiny):
    config = tiny()
    files = TokenFiles(config.data.train)
    ids = np.concatenate([files.read(document) for document in range(files.documents)])
    share = np.array([(ids == token).mean() for token in range(320)])
    expected = -sum(p * math.log(p) for p in share if p > 0)
    assert unigram_entropy(files, 320) == pytest.approx(expected)
    assert token_counts(files, 320).sum() == files.tokens


def test_a_merge_map_is_drawn(model_and_tokenizer, tmp_path):
    found = inspect_text(*model_and_tokenizer, TEXT + "$x$ {_} \\frac and a longer line " * 9, layer=0, head=0)
    plot_merge_map(found.pieces, found.heads[0], tmp_path / "deep" / "map.png", title="map")
    assert_picture(tmp_path / "deep" / "map.png")


def test_the_loss_curve_of_a_finished_run_is_drawn(tiny, tmp_path):
    config = tiny("train.validation_interval_steps=4", "train.validation_batches=1")
    train(config)
    run = Path(config.run_dir)
    plot_loss_curve(run / "metrics.jsonl", tmp_path / "loss.png", title="t", levels={"unigram": 5.0}, resumed_at=[4])
    assert_picture(tmp_path / "loss.png")


def test_a_loss_curve_needs_a_loss(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="no training loss"):
        plot_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png", title="t")


def test_the_quickstart_explains_a_mistake(capsys):
    assert quickstart(["train.stepz=4"]) == 2
    assert "train.steps" in capsys.readouterr().err


def test_a_quickstart_that_is_interrupted_says_that_it_goes_on(monkeypatch, capsys):
    def interrupted(overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr("dla_train.quickstart.quickstart", interrupted)
    assert quickstart([]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.slow
def test_the_quickstart_goes_from_nothing_to_pictures_and_again_in_a_moment(tmp_path):
    """The whole of `make quickstart` on its own corpus, with a few short steps; then again: everything is kept."""
    folder = tmp_path / "stdlib"
    overrides = [
        f"data.tokenizer={folder}.model",
        f"data.train=[{folder}_train]",
        f"data.validation=[{folder}_validation]",
        f"run_dir={tmp_path}/run",
        "data.context_tokens=64",
        "train.steps=4",
        "train.global_batch_rows=2",
        "train.micro_batch_rows=2",
        "train.validation_batches=1",
        "optim.warmup_steps=1",
        "logging.progress=false",
    ]
    for _ in range(2):
        done = run_python(["-m", "dla_train.quickstart", *overrides], timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["step"] == 4
    assert 6.0 < report["unigram_entropy"] < 7.0 < report["held_out_loss"] < math.log(4096) + 1
    assert report["sample"] and report["cache_bytes"] > 0
    for name in ("loss_curve.png", "merge_map.png"):
        assert_picture(tmp_path / "run" / name)
    assert "tokenizer:" not in done.stdout, "the second time nothing is prepared anew"
