"""`dla-diagnose` on checkpoints of tiny runs: what it writes, that it is right, and mistakes."""

import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch

from dla_train.config import ConfigError
from dla_train.data.indexed import TokenFiles
from dla_train.diagnose import arms
from dla_train.diagnose.arms import common_tokenizer, open_arms
from dla_train.diagnose.command import main
from dla_train.diagnose.scoring import choose_documents, document_losses
from dla_train.diagnose.settings import read_settings
from dla_train.evaluate.loading import load_model
from dla_train.hydra_app import compose
from dla_train.train import train
from tests.train.runs import TINY

SHORT = ["context_tokens=48", "minimum_tokens=30", "documents=6", "chunk_tokens=7"]


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Folder of the runs dla (checkpoints of steps 2 and 4), single, log_linear and attention."""
    folder = tmp_path_factory.mktemp("diagnosed")
    kinds = {
        "dla": [],
        "single": ["memory=single"],
        "log_linear": ["memory=log_linear", "memory.capacity=6"],
        "attention": ["model.backbone=attention", "model.conv_width=0", "memory=none"],
    }
    for name, settings in kinds.items():
        short = ["train.steps=4", "checkpoint.interval_steps=2", "checkpoint.keep_last=0"]
        train(compose([*TINY, *corpus, *short, *settings, f"name={name}", f"run_dir={folder}/{name}"]))
    return folder


def diagnose(folder: Path, runs: list[str], *words: str) -> dict:
    assert main([f"runs=[{','.join(runs)}]", f"output={folder}", *SHORT, *words]) == 0
    return json.loads((folder / "diagnostics.json").read_text())


def test_arms_are_compared_on_the_same_documents_also_beyond_the_trained_length(runs, tmp_path, capsys):
    report = diagnose(tmp_path, [f"{runs}/single", f"{runs}/dla", f"{runs}/attention"], "lengths=[32,8]")
    assert [arm["name"] for arm in report["arms"]] == ["single", "dla", "attention"]
    assert report["text"]["positions"] == 48 > report["arms"][0]["trained_context_tokens"] == 32
    assert [(line["first"], line["end"]) for line in report["bands"]] == [(0, 3), (3, 12), (12, 24), (24, 48)]
    assert [line["end"] for line in report["lengths"]] == [8, 32]
    arrays = np.load(tmp_path / "diagnostics.npz")
    nats = arrays["nats"].astype(np.float64)
    assert arrays["names"].tolist() == ["single", "dla", "attention"] and nats.shape == (3, 6, 48)
    assert np.isnan(nats[0]).any() and (np.isnan(nats[0]) == np.isnan(nats[2])).all()
    expected = np.nanmean(nats[:, :, :8].mean(2), 1)
    got = [report["lengths"][0]["arms"][arm]["mean"] for arm in ("single", "dla", "attention")]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    difference = (nats[1, :, :8] - nats[0, :, :8]).mean()
    assert report["lengths"][0]["differences"]["dla"]["mean"] == pytest.approx(difference, rel=1e-9)
    np.testing.assert_allclose(arrays["total"], np.nansum(nats, 1), rtol=1e-12)
    np.testing.assert_allclose(arrays["difference_total"][0], np.nansum(nats[1] - nats[0], 0), atol=1e-12)
    np.testing.assert_allclose(arrays["difference_squares"][0], np.nansum((nats[1] - nats[0]) ** 2, 0), atol=1e-12)
    for name in ("loss_by_position.png", "perplexity_by_length.png", "recalled.png"):
        pixels = matplotlib.image.imread(tmp_path / name)
        assert pixels.shape[0] > 400 and pixels[..., :3].std() > 0.05
    assert [(line["first"], line["end"]) for line in report["recalled"]][:4] == [(0, 1), (1, 48), (1, 2), (2, 4)]
    assert report["recalled"][0]["arms"]["dla"]["documents"] == 6
    printed = capsys.readouterr().out
    assert "| recalled from 2 to 3 back |" in printed
    assert "| 3 to 11 |" in printed and printed.strip() in (tmp_path / "diagnostics.md").read_text()


def test_a_checkpoint_against_itself_differs_by_exactly_zero_and_against_an_earlier_one_does_not(runs, tmp_path):
    report = diagnose(tmp_path, [f"{runs}/dla", f"{runs}/dla@4", f"{runs}/dla@2"], "names=[now,same,early]")
    assert [(arm["name"], arm["step"]) for arm in report["arms"]] == [("now", 4), ("same", 4), ("early", 2)]
    for part in ("bands", "curve", "lengths"):
        for line in report[part]:
            same = line["differences"]["same"]
            assert (same["mean"], same["low"], same["high"]) == (0, 0, 0)
        assert any(line["differences"]["early"]["mean"] for line in report[part])
    arrays = np.load(tmp_path / "diagnostics.npz")
    assert not arrays["difference_total"][0].any() and not arrays["difference_squares"][0].any()


def test_names_are_made_different(runs, tmp_path):
    report = diagnose(tmp_path, [f"{runs}/dla", f"{runs}/dla@2", f"{runs}/dla@4"])
    assert [arm["name"] for arm in report["arms"]] == ["dla@4 (1)", "dla@2", "dla@4 (3)"]
    assert arms._names([("quickstart", "single", 200), ("quickstart", "run", 200)]) == ["single", "run"]


@torch.no_grad()
def test_losses_in_chunks_and_batches_are_those_of_each_document_alone(runs):
    model, config, _ = load_model(runs / "dla")
    files = TokenFiles(config.data.validation)
    documents = choose_documents(files, 5, 60, 20)
    assert (documents.lengths >= 20).all() and documents.lengths.min() < 61
    found = np.concatenate(list(document_losses(model, documents, batch_rows=2, chunk_tokens=9)))
    for row, (number, length) in enumerate(zip(documents.numbers, documents.lengths, strict=True)):
        ids = torch.from_numpy(files.read(int(number)))[None, :length]
        scores = model(ids[:, :-1]).logits[0].log_softmax(-1)
        expected = -scores.gather(-1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(found[row, : length - 1], expected.numpy(), rtol=2e-4, atol=2e-4)
        assert np.isnan(found[row, length - 1 :]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=[{0}/dla]"], "a comparison needs two"),
        (["runs=[{0}/dla,{0}/nowhere]"], "nowhere"),
        (["runs=[{0}/dla,{0}/dla@3]"], "no checkpoint of step 3; choose from 2, 4"),
        (
            ["runs=[{0}/dla,{0}/single]", "context_tokens=99999"],
            "0 documents of 100000 tokens or more (the longest has",
        ),
        (["runs=[{0}/dla,{0}/single]", "lengths=[99]", *SHORT], "lengths=[99] lie outside 1 to context_tokens=48"),
        (["runs=[{0}/dla,{0}/single]", "band_edges=[9,4]", *SHORT], "band_edges"),
        (["runs=[{0}/dla,{0}/single]", "data=[{0}/absent]"], "absent"),
        (["runs=[{0}/single,{0}/log_linear]", *SHORT], "more than the 32 that the log_linear memory of log_linear"),
    ],
)
def test_a_mistake_is_explained_before_anything_is_written(runs, tmp_path, capsys, words, message):
    output = tmp_path / "out"
    assert main([*(word.replace("{0}", str(runs)) for word in words), f"output={output}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dla-diagnose: error: ") and message in error
    assert not output.exists()


def test_runs_of_another_tokenizer_are_refused(runs, monkeypatch):
    opened = open_arms(read_settings([f"runs=[{runs}/dla,{runs}/single]"]))
    opened[1].config.data.tokenizer = "other.model"
    monkeypatch.setattr(arms, "load_tokenizer", lambda path: SimpleNamespace(name=Path(path).name, fingerprint=path))
    with pytest.raises(ConfigError, match="single was trained with tokenizer other.model, dla with tiny.model"):
        common_tokenizer(opened)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=[a,b]", "document=3"], "document is not a setting of dla-diagnose; did you mean documents?"),
        (["runs=[a,b]", "documents=1"], "documents=1 must be at least 2"),
        (["runs=[a,b]", "documents=many"], "documents: "),
        (["runs=[a,b]", "chunk_tokens=0"], "chunk_tokens=0"),
        (["runs=[a,b]", "confidence=1.0"], "confidence=1.0"),
        (["runs=[a,b]", "device=tpu"], "device=tpu is not one of auto, cpu, cuda"),
        (["runs=[a,b]", "names=[x]"], "2 different names"),
        (["runs=[a,b"], r"runs=\[a,b has half of a pair of brackets; quote the whole word"),
        (["runs=a"], r"runs=a is not a list; write runs=\[a\]"),
        (["runs=a,b"], r"runs=a,b gives several values; write runs=\[a,b\] for a list, or quote it"),
        (["--runs=[a,b]"], r"--runs=\[a,b\]: write runs=\[a,b\], without --; `dla-diagnose --help` prints every"),
        (["runs"], "runs cannot be read; write key=value"),
        (["documents=3"], r"runs=\[\] names 0 runs"),
    ],
)
def test_settings_are_checked(words, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(words)


def test_help_names_every_setting(capsys):
    assert main(["--help"]) == 0 and "minimum_tokens=0" in capsys.readouterr().out
    assert main([]) == 2
