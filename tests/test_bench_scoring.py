"""The scoring benchmark: the same tokens go through every form, and its page has their shares."""

import json

import pytest
import torch

from dla_train.bench import scoring
from dla_train.bench.__main__ import main


def test_every_form_is_given_all_tokens_and_the_page_says_how_they_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "MODELS", (("mamba2_tiny", "single"),))
    monkeypatch.setattr(scoring, "LENGTHS", {"questions": (4, 9)})
    assert main(["scoring", f"--output={tmp_path}", "--rounds=1", "--tokens=60", "--batch-tokens=20"]) == 0
    (measured,) = json.loads((tmp_path / "scoring.json").read_text())["measured"]
    assert 60 <= measured["tokens"] < 70 and measured["padding"] >= 0
    speeds = measured["tokens_per_second"]
    share = speeds["scoring"][0] / speeds["plain"][0]
    page = (tmp_path / "scoring.md").read_text()
    assert f"{share:.0%} ({share:.0%} to {share:.0%})" in page and page in capsys.readouterr().out
    assert ("**missed**" in page) == (share < scoring.LEAST)


def test_packed_rows_are_all_given_and_none_is_split():
    rows, given = [(1,) * 7, (2,) * 6, (3,) * 6, (4,)], []

    class Model:
        embedding = type("E", (), {"weight": torch.zeros(1)})

        def __call__(self, tokens, offsets):
            given.append((tokens.tolist()[0], offsets.tolist()))

    scoring._packed(Model(), rows, 12)
    assert [offsets for _, offsets in given] == [[0, 7], [0, 6, 12], [0, 1]]
    assert [token for tokens, _ in given for token in tokens] == [token for row in rows for token in row]


def test_requests_are_distinct_and_of_unequal_length():
    made = scoring.make_requests("questions", 2000, 320)
    assert len({request.inputs for request in made}) == len(made)
    assert len({len(request.inputs) for request in made}) > 10
    assert all(request.targets[:-1] == request.inputs[-3:] for request in made)
    assert sum(len(request.inputs) for request in made) == pytest.approx(2000, abs=96)
