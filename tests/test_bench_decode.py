"""The decoding benchmark measures what it says, on two short contexts."""

import json

import pytest

from dla_train.bench.__main__ import main
from dla_train.bench.decode import ARMS, growth, page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    words = ["--rounds=1", "--steps=2", "--longest=2048", "--attention-prefill=1024"]
    assert main(["decode", f"--output={folder}", f"--images={folder}/images", *words]) == 0
    return folder


def test_recurrent_caches_stay_as_they_are_and_attentions_grow(folder):
    results = json.loads((folder / "decode.json").read_text())
    for arm, (backbone, _) in ARMS.items():
        held = {line["context"]: line["cache_bytes"] for line in results["decode"] if line["arm"] == arm}
        assert sorted(held) == [1024, 2048]
        ratio = held[2048] / held[1024]
        assert ratio == pytest.approx(2, rel=0.01) if backbone == "attention" else ratio == 1
        assert all(time > 0 for line in results["decode"] for time in line["milliseconds"])


def test_a_cache_that_was_filled_says_so_and_is_timed_beside_a_prefilled_one(folder):
    results = json.loads((folder / "decode.json").read_text())
    kinds = [(line["context"], line["filled"]) for line in results["decode"] if line["arm"] == "Transformer"]
    assert sorted(kinds) == [(1024, False), (1024, True), (2048, True)]
    assert not any(line["filled"] for line in results["decode"] if line["arm"] != "Transformer")
    text = (folder / "decode.md").read_text()
    assert "* cache filled with random keys" in text and "At 1K such a cache took" in text
    assert (folder / "images" / "decode_context.png").stat().st_size > 10_000


def test_growth_is_the_median_of_the_ratios_of_each_round():
    lines = [
        {"arm": "Transformer", "context": 1024, "filled": False, "milliseconds": [1.0, 2.0, 4.0]},
        {"arm": "Transformer", "context": 4096, "filled": True, "milliseconds": [3.0, 2.0, 20.0]},
    ]
    assert growth({"decode": lines}, "Transformer") == [1.0, 3.0, 5.0]


def test_the_page_is_made_of_the_json_alone(folder):
    assert page(json.loads((folder / "decode.json").read_text())) == (folder / "decode.md").read_text()
