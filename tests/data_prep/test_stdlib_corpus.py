"""The newcomer's corpus: large, repeatable, of every kind, and without near copies."""

import json
from pathlib import Path

import pytest

from data_prep.stdlib_corpus import CorpusReport, _is_new, write_stdlib_corpus
from dla_train.data.errors import TokenFileError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusReport:
    return write_stdlib_corpus(tmp_path_factory.mktemp("corpus") / "stdlib.jsonl", progress=False)


def test_corpus_is_megabytes_of_every_kind(corpus: CorpusReport) -> None:
    records = [json.loads(line) for line in corpus.path.read_text(encoding="utf-8").splitlines()]
    assert corpus.text_bytes == sum(len(record["text"].encode()) for record in records) > 8e6
    kinds = [record["kind"] for record in records]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == corpus.documents
    assert set(kinds) == {"topic", "docstrings", "source"}
    by_name = {(record["kind"], record["name"]): record["text"] for record in records}
    assert "assert" in by_name["topic", "assert"]
    assert "math.acos" in by_name["docstrings", "math"]
    assert "class JSONDecoder" in by_name["source", "json/decoder.py"]
    assert len(by_name) == len(records) == len({record["text"] for record in records})
    assert not any("site-packages" in record["name"] for record in records)


def test_corpus_is_the_same_every_time(corpus: CorpusReport, tmp_path: Path) -> None:
    again = write_stdlib_corpus(tmp_path / "again.jsonl", progress=False)
    assert again.path.read_bytes() == corpus.path.read_bytes()
    assert again.documents == corpus.documents


def test_corpus_is_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("mine")
    with pytest.raises(TokenFileError, match="exists already"):
        write_stdlib_corpus(path, progress=False)
    assert path.read_text() == "mine"


def test_near_copies_and_short_texts_are_left_out_and_counted() -> None:
    report, seen = CorpusReport(Path("x")), set[bytes]()
    text = "".join(f"a line of text with the number {i} in it\n" for i in range(20))
    assert _is_new(text, seen, report)
    assert not _is_new(text.replace("number 3 ", "numeral 3 "), seen, report)
    assert _is_new(text.replace("number", "numeral"), seen, report)
    assert not _is_new("short", seen, report)
    assert (report.near_copies, report.too_short) == (1, 1)


def test_sources_that_are_not_utf8_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9 " + b"x" * 100)
    (tmp_path / "plain.py").write_text("# " + "y" * 100)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    report = write_stdlib_corpus(tmp_path / "out.jsonl", progress=False)
    assert report.not_utf8 == 1
    assert report.documents["source"] == 1
