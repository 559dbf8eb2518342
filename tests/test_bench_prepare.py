"""The preparation benchmark: what it times is done, and every number of its page comes from its JSON."""

import json
from pathlib import Path

import pytest

from dla_train.bench import prepare
from dla_train.bench.__main__ import main


def test_a_small_run_writes_every_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 1000)
    monkeypatch.setattr(prepare, "DUPLICATES", ("exact",))
    assert main(["prepare", "--output", str(tmp_path), "--rounds", "1", "--megabytes", "0.3"]) == 0
    results = json.loads((tmp_path / "prepare.json").read_text())
    (found,) = results["scaling"]
    assert found["one"]["tokens"] == found["several"]["tokens"] == found["apart"]["tokens"] > 10_000
    assert found["several"]["worker_cpu_seconds"] > 0 == found["one"]["worker_cpu_seconds"]
    page = (tmp_path / "prepare.md").read_text()
    assert page in capsys.readouterr().out and "| 2 processes |" in page and "| exact |" in page


def test_ratios_and_spreads_are_those_of_the_rounds() -> None:
    rounds = [{"one": {"seconds": a}, "several": {"seconds": b}} for a, b in ((6.0, 3.0), (4.0, 4.0), (9.0, 6.0))]
    assert prepare.ratios({"scaling": rounds}, "one", "several") == [1.0, 1.5, 2.0]
    assert prepare._spread([1.0, 2.0, 1.5]) == "1.50 (1.00 to 2.00)"
