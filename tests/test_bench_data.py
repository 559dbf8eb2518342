"""The measurement of reading data, on a small corpus: every number is there, and the same tokens are read."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dla_train.bench import data
from dla_train.bench.__main__ import main
from dla_train.data.indexed import TokenFiles


def test_the_written_corpus_is_whole_and_a_hole_has_its_size(tmp_path: Path) -> None:
    tokens = [data.write_corpus(str(tmp_path / name), 500, filled=name == "full") for name in ("full", "hole")]
    full, hole = (TokenFiles([tmp_path / name], vocab_size=32000) for name in ("full", "hole"))
    assert tokens == [full.tokens, hole.tokens] and full.documents == hole.documents == 500
    assert full.read(3).any() and not hole.read(3).any()


def test_megatron_reads_rows_of_the_same_tokens(tmp_path: Path) -> None:
    total = data.write_corpus(str(tmp_path / "c"), 60, filled=True)
    rows = data.megatron_dataset(str(tmp_path / "c"), 512, total // 512 - 1, tmp_path / "cache")
    assert rows[0]["tokens"].shape == (512,)
    stored = np.fromfile(tmp_path / "c.bin", dtype="<u2")
    assert set(rows[0]["tokens"].tolist()) <= set(stored.tolist())


@pytest.mark.parametrize("what", ["concatenate", "best_fit", "megatron"])
def test_a_start_is_timed_and_its_memory_read(tmp_path: Path, what: str) -> None:
    data.write_corpus(str(tmp_path / "c"), 200, filled=False)
    numbers = data.start(str(tmp_path / "c"), what, 256)
    assert numbers["seconds"] > 0 and numbers["peak_bytes"] >= numbers["imported_bytes"] > 1 << 20


def test_results_are_written_with_every_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_once(command: list[str], **options: bool) -> subprocess.CompletedProcess[str]:
        """A start in this process: importing torch again would take seconds."""
        assert command[1:4] == ["-m", "dla_train.bench.data", "--start"] and options["check"]
        numbers = json.dumps(data.start(command[4], command[5], int(command[6])))
        return subprocess.CompletedProcess(command, 0, stdout=f"other output\n{numbers}\n")

    monkeypatch.setattr(data, "CONTEXTS", (256,))
    monkeypatch.setattr(data.subprocess, "run", at_once)
    monkeypatch.setattr(data, "environment", lambda: {"torch": "x", "python": "y"})  # asks the system by subprocess
    assert main(["data", "--output", str(tmp_path), "--rounds", "2", "--documents", "2000"]) == 0
    results = json.loads((tmp_path / "data.json").read_text())
    assert set(results["reading"]["256"]) == {"concatenate", "best_fit", "megatron"}
    assert [start["what"] for start in results["starts"]] == ["concatenate", "best_fit", "megatron"]
    page = (tmp_path / "data.md").read_text()
    assert page in capsys.readouterr().out and page.count("| 256 |") == 6
    assert results["demand"]["tokens_per_second"] > 1e5
