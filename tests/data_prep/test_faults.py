"""Records that cannot be used: counted and named by one policy, fatal by the other, and never more than allowed."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.prepare import main
from data_prep.records import FAULTS, PrepareError, RecordError, SourceOptions, document, documents
from data_prep.report import TokensReport
from data_prep.sources import text_sources
from data_prep.write_tokens import TokenOptions, write_tokens
from tests.data_prep.corpora import stored_tokens

GOOD = b'{"text": "a good line"}\n'
BAD: dict[str, list[bytes]] = {
    "not_json": [b"{", b'{"text": "x"', b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}", b"\x00"],
    "not_utf8": [b'{"text": "caf\xe9"}', b'{"text": "\\ud83d"}'],
    "no_field": [b'{"body": "x"}', b"{}"],
    "wrong_type": [b'{"text": 3}', b'{"text": null}', b'{"text": ["a"]}', b"[1]", b'"text"', b"12"],
    "oversized": [b'{"text": "' + b"x" * 2000 + b'"}', b"x" * 5000],
}


def write(path: Path, output: Path, tokenizer: Path, **options: Any) -> TokensReport:
    sources = text_sources([path], options.pop("source", SourceOptions(largest_bytes=1000)))
    return write_tokens(sources, output, tokenizer, TokenOptions(**options), progress=False)


@pytest.mark.parametrize(("kind", "line"), [(kind, line) for kind, lines in BAD.items() for line in lines])
def test_a_bad_line_is_skipped_and_counted_or_stops_with_its_place(
    kind: str, line: bytes, tokenizer_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    source = SourceOptions(largest_bytes=200_000 if kind == "not_json" else 1000)
    with pytest.raises(RecordError, match=r"a\.jsonl, line 3") as caught:
        write(path, tmp_path / "out", tokenizer_path, source=source)
    assert caught.value.kind == kind and "--on-error skip" in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    report = write(path, tmp_path / "out", tokenizer_path, source=source, on_error="skip", max_error_share=0.5)
    assert report.counts == {"kept": 2, kind: 1} and report.errors == 1
    assert report.faults == [caught.value.message] and "--on-error" not in caught.value.message
    assert json.loads((tmp_path / "out.report.json").read_text())["faults"] == report.faults
    assert len(stored_tokens(tmp_path / "out")) == 2


def test_every_kind_of_fault_has_a_test() -> None:
    assert {*BAD, "damaged"} == set(FAULTS)


@given(st.lists(st.binary(max_size=60), max_size=30))
def test_any_bytes_are_a_document_or_a_counted_fault(lines: list[bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.jsonl", "a.txt"):
            path = Path(folder, name)
            path.write_bytes(b"\n".join(lines))
            source = text_sources([path], SourceOptions(separator="\n"))[0]
            for record in source.records():
                try:
                    text, unwanted = document(record)
                except RecordError as error:
                    assert error.kind in FAULTS and str(path) in error.message
                else:
                    assert unwanted in (None, "empty") and text.encode() is not None


def test_more_bad_records_than_allowed_are_an_error(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 97 + b"{\n" * 3)
    with pytest.raises(PrepareError, match=r"3 of 100 records .*max_error_share=0\.029; .*the first: .*line 98 is not"):
        write(path, tmp_path / "out", tokenizer_path, on_error="skip", max_error_share=0.029)
    assert list(tmp_path.iterdir()) == [path]
    assert write(path, tmp_path / "out", tokenizer_path, on_error="skip", max_error_share=0.03).errors == 3


def test_a_bad_corpus_is_given_up_before_its_end(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"{\n" * 50_000)
    with pytest.raises(PrepareError, match=r" of (\d+) records") as caught:
        write(path, tmp_path / "out", tokenizer_path, on_error="skip")
    assert int(str(caught.value).split(" of ")[1].split()[0]) < 20_000


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("cut", [20, 300])
def test_a_truncated_file_gives_what_can_be_read_and_a_fault(
    suffix: str, cut: int, tokenizer_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    data = b"".join(b'{"text": "line %d %s"}\n' % (i, os.urandom(40).hex().encode()) for i in range(2000))
    path.write_bytes(compressed(data, suffix)[:-cut])
    with pytest.raises(PrepareError, match=rf"a\.jsonl\.{suffix} is a damaged \.{suffix} file .* after line \d+ at"):
        write(path, tmp_path / "out", tokenizer_path)
    report = write(path, tmp_path / "out", tokenizer_path, on_error="skip")
    assert report.counts["damaged"] == 1 and 100 < report.counts["kept"] <= 2000


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == "gz":
        return gzip.compress(data)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("separator", [None, "|"])
def test_a_bomb_is_never_held_in_memory(
    suffix: str, separator: str | None, tokenizer_path: Path, tmp_path: Path
) -> None:
    import tracemalloc

    size = 64 << 20
    path = tmp_path / f"a.{'txt' if separator else 'jsonl'}.{suffix}"
    path.write_bytes(compressed(bytes(size) + b"|\n" + GOOD, suffix))
    assert path.stat().st_size < size / 500
    source = text_sources([path], SourceOptions(largest_bytes=1 << 20, separator=separator))[0]
    tracemalloc.start()
    records = list(source.records())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(records[0].payload, RecordError) and records[0].payload.kind == "oversized"
    assert document(records[1])[0].strip() in ("a good line", GOOD.decode().strip()) and peak < 12 << 20


def test_several_zst_frames_in_one_file_are_read_through(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(compressed(GOOD, "zst") * 3)
    assert [text for text, _ in documents(text_sources([tmp_path])[0])] == ["a good line"] * 3


def test_damaged_parquet_is_a_fault_with_its_row(tokenizer_path: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = [f"row {i} {os.urandom(30).hex()}" for i in range(4000)]
    parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=500, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    report = write(path, tmp_path / "out", tokenizer_path, on_error="skip", max_error_share=0.5)
    assert report.counts["damaged"] >= 1 and report.counts["kept"] >= 1000
    assert "a.parquet is not a readable Parquet file after row" in report.faults[-1]


def test_the_command_names_what_it_left_out(
    tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD * 3 + b"{\n" * 12)
    arguments = ["tokens", str(tmp_path / "a.jsonl"), "--tokenizer", str(tokenizer_path), "--quiet"]
    arguments += ["--output", str(tmp_path / "out"), "--on-error", "skip", "--max-error-share", "1"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "left out: 12 not_json;" in printed.out
    assert printed.err.count("a.jsonl, line ") == 10 and "and 2 more" in printed.err
