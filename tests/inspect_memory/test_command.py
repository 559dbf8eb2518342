"""`dla-inspect` on a tiny run: the files it writes, what the page holds, and mistakes."""

import base64
import dataclasses
import io
import json
import re
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest

from dla_train.config import ConfigError
from dla_train.data.tokenizer import load_tokenizer
from dla_train.evaluate.loading import load_model
from dla_train.hydra_app import compose
from dla_train.inspect_memory import command, page
from dla_train.inspect_memory.command import main
from dla_train.inspect_memory.history import inspect_text
from dla_train.inspect_memory.settings import read_settings
from dla_train.inspect_memory.timelines import slot_colours
from dla_train.optim import gate_temperature
from dla_train.train import train
from tests.train.runs import TINY

TEXT = "line 3 adds 9 to 1, [x=1] </script><b>$x$ {_} \\frac & a longer line\nGr\u00fc\u00dfe from line 4\n" * 3


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("inspected")
    short = ["train.steps=4", "checkpoint.interval_steps=2", "checkpoint.keep_last=0", "memory.capacity=4"]
    train(compose([*TINY, *corpus, *short, f"run_dir={folder}/run"]))
    return folder / "run"


def page_of(folder):
    """(the page, its data)."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    return text, json.loads(data)


def unpacked(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


def test_page_and_pictures_of_a_text_are_written(run, tmp_path, capsys):
    assert main([f"run={run}", f"text={TEXT}", f"output={tmp_path}/deep/out"]) == 0
    written = capsys.readouterr().out.split()
    assert sorted(path.name for path in (tmp_path / "deep/out").iterdir()) == sorted(
        ["index.html", "merge_map.png", "read_weights.png", "slot_timeline.png"]
    )
    assert [path.rsplit("/", 1)[1] for path in written][0] == "index.html"
    for path in written[1:]:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[0] > 200 and pixels.shape[1] > 400
        assert pixels[..., :3].std() > 0.05, "the picture is blank"


def test_the_page_holds_every_heads_history_and_loads_nothing(run, tmp_path):
    assert main([f"run={run}", "step=2", f"text={TEXT}", f"output={tmp_path}"]) == 0
    text, data = page_of(tmp_path)
    assert not re.search(r"(src|href)\s*=|https?:|@import|url\(|fetch\(", text.replace("Content-Security-Policy", ""))
    assert "default-src 'none'" in text and text.count("</script>") == 2
    assert "<title>tiny, step 2</title>" in text
    model, config, _ = load_model(run, 2)
    temperature = gate_temperature(config.memory, 4, 2)
    found = inspect_text(model, load_tokenizer(config.data.tokenizer), TEXT, gate_temperature=temperature)
    assert "".join(data["pieces"]) == TEXT and len(data["heads"]) == len(found.heads) == 4
    for packed, head in zip(data["heads"], found.heads, strict=True):
        assert (packed["layer"], packed["head"], packed["capacity"]) == (head.layer, head.head, 4)
        assert packed["tau"] == head.tau
        np.testing.assert_array_equal(unpacked(packed["score"], "<f4"), head.score)
        np.testing.assert_array_equal(unpacked(packed["gate"], "<f4"), head.gate)
        death = unpacked(packed["death"], "<i4")
        np.testing.assert_array_equal(death >= 0, head.boundary)
        np.testing.assert_array_equal(death[death >= 0], head.death[head.boundary])
        live = head.weights[~np.isnan(head.weights)]
        assert len(live) == sum(len(starts) for starts in head.live)
        weights = unpacked(packed["weights"], "<u2") / 65535 * packed["largest"]
        np.testing.assert_allclose(weights, live, atol=1e-4)


def test_pictures_and_page_begin_with_the_chosen_head(run, tmp_path, monkeypatch):
    drawn = []
    for name in ("plot_merge_map", "plot_slot_timeline", "plot_read_weights"):
        monkeypatch.setattr(command, name, lambda *arguments, title: drawn.append(arguments[-2]))
    assert main([f"run={run}", f"text={TEXT}", "layer=1", "head=0", f"output={tmp_path}"]) == 0
    assert [(head.layer, head.head) for head in drawn] == [(1, 0)] * 3
    _, data = page_of(tmp_path)
    assert data["chosen"] == [1, 0] and len(data["heads"]) == 1


def test_text_comes_from_a_file_and_from_standard_input(run, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    for words in ([f"file={tmp_path}/text.txt"], ["file=-"]):
        assert main([f"run={run}", *words, "layer=0", "head=1", f"output={tmp_path}/out"]) == 0
        assert "".join(page_of(tmp_path / "out")[1]["pieces"]) == TEXT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text=a"], "run has no value"),
        (["run={0}"], "there is no text; write one of text="),
        (["run={0}", "text=a", "file=b"], "text and file are both given"),
        (["run={0}", "file={0}/absent"], "absent"),
        (["run={0}", "file={0}/latin"], "is not UTF-8 (byte 2)"),
        (["run={0}", "file={0}/nowhere"], "nowhere cannot be read: No such file"),
        (["run={0}/nowhere", "text=a"], "nowhere"),
        (["run={0}", "text=a", "step=3"], "no checkpoint of step 3; choose from 2, 4"),
        (["run={0}", "text=a", "step=-1"], "step=-1 is below 0"),
        (["run={0}", "text=a", "layer=2"], "layer=2 does not exist; choose 0 to 1, or all"),
        (["run={0}", "text=a", "layer=first"], "layer=first is neither a number from 0 nor all"),
        (["run={0}", "text=abc abc abc abc", "max_tokens=3"], "more than max_tokens=3"),
        (["run={0}", "text=a", "heads=2"], "heads is not a setting of dla-inspect; did you mean head?"),
        (["run={0}", "text=a", "max_tokens=many"], "max_tokens"),
        (["run={0}", "text=a", "device=tpu"], "device=tpu is not one of auto, cpu, cuda"),
        (["run={0}", "text"], "there is no text"),
        (["--run", "{0}"], "--run: write run=VALUE, without --"),
    ],
)
def test_mistakes_are_explained_and_nothing_is_written(run, tmp_path, capsys, words, message):
    (run / "latin").write_bytes("Gr\u00fc".encode("latin-1"))
    assert main([*(word.format(run) for word in words), f"output={tmp_path}/out"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_names_every_setting(capsys):
    assert main(["--help"]) == 0 and main([]) == 2
    assert "\n  max_tokens=2048\n" in capsys.readouterr().out


def test_text_is_taken_as_it_is(run):
    assert read_settings([f"run={run}", "text=a=[1, {b"]).text == "a=[1, {b"


def test_a_page_that_would_be_too_large_is_refused(run, tmp_path, monkeypatch):
    model, config, _ = load_model(run)
    found = inspect_text(model, load_tokenizer(config.data.tokenizer), TEXT)
    monkeypatch.setattr(page, "MOST_BYTES", 4000)
    with pytest.raises(ConfigError, match="choose a layer=, a head= or a shorter text"):
        page.write_page(found, tmp_path / "x.html", title="t", facts=[], chosen=found.heads[0])
    assert not (tmp_path / "x.html").exists()


def test_a_token_that_reads_like_markup_stays_text(run, tmp_path):
    model, config, _ = load_model(run)
    found = inspect_text(model, load_tokenizer(config.data.tokenizer), TEXT, layer=0, head=0)
    pieces = ["</script><script>alert(1)", "<!--", *found.pieces[2:]]
    odd = dataclasses.replace(found, pieces=pieces)
    page.write_page(odd, tmp_path / "index.html", title="a <b> & c", facts=["</div>"], chosen=odd.heads[0])
    text, data = page_of(tmp_path)
    assert data["pieces"] == pieces and data["facts"] == ["</div>"]
    assert text.count("</script>") == 2 and text.count("<!--") == 0
    assert "<title>a &lt;b&gt; &amp; c</title>" in text


def test_tokens_have_the_colour_of_the_boundary_before_them(run):
    model, config, _ = load_model(run)
    head = inspect_text(model, load_tokenizer(config.data.tokenizer), TEXT, layer=0, head=0).heads[0]
    colours = slot_colours(head)
    changes = (np.abs(np.diff(colours, axis=0)).sum(1) > 0).tolist()
    assert changes == head.boundary[1:].tolist() and any(changes)
