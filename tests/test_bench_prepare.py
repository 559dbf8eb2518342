"""The preparation benchmark: what it times is done, and every number of its page comes from its JSON."""

import json
from pathlib import Path

import pytest

from dla_train.bench import prepare
from dla_train.bench.__main__ import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 200 KB, whole and in two parts."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "VOCAB_SIZE", 1000)
        prepare.write_corpus(folder, 200_000, 2)
    return folder


def test_processes_are_timed_and_their_processor_time_is_told_apart(folder: Path) -> None:
    several = prepare._run(folder, ["whole"], 2, "exact")
    assert several["worker_cpu_seconds"] > 0 < several["reader_cpu_seconds"]
    assert several["seconds"] > 0 and several["duplicates"] == "exact" and several["text_bytes"] > 150_000


def test_the_parts_are_the_whole(folder: Path) -> None:
    whole, *parts = (prepare.once(folder, name, 1, "keep") for name in ("whole", "part0", "part1"))
    assert whole["tokens"] == parts[0]["tokens"] + parts[1]["tokens"] > 10_000
    assert whole["documents"] == parts[0]["documents"] + parts[1]["documents"]


def test_the_page_has_every_number(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Path, corpora: list[str], workers: int, duplicates: str) -> dict[str, object]:
        found = prepare.once(folder, corpora[0], 1, duplicates) | {"reader_cpu_seconds": 1.0, "worker_cpu_seconds": 3.0}
        return {"duplicates": duplicates, "seconds": 12.0 / workers, **found}

    monkeypatch.setattr(prepare, "_run", run)
    monkeypatch.setattr(prepare, "write_corpus", lambda *_: None)
    assert main(["prepare", "--output", str(tmp_path), "--rounds", "2"]) == 0
    results = json.loads((tmp_path / "prepare.json").read_text())
    assert len(results["scaling"]) == 2 and [run["duplicates"] for run in results["duplicates"]] == [
        "keep",
        "exact",
        "near",
    ]
    page = (tmp_path / "prepare.md").read_text()
    assert page in capsys.readouterr().out and "| 2 processes |" in page and "| near |" in page
    assert "2 processes are 2.00 (2.00 to 2.00) times as fast as one" in page
    assert "take 1.00 times the processor time" in page and "feeds 3 tokenising" in page


def test_ratios_and_spreads_are_those_of_the_rounds() -> None:
    rounds = [{"one": {"seconds": a}, "several": {"seconds": b}} for a, b in ((6.0, 3.0), (4.0, 4.0), (9.0, 6.0))]
    assert prepare.ratios({"scaling": rounds}, "one", "several") == [1.0, 1.5, 2.0]
    assert prepare._spread([1.0, 2.0, 1.5]) == "1.50 (1.00 to 2.00)"
