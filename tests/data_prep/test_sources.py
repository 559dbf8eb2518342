"""Text sources: the same documents from every format, and bad input named with its place."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.huggingface import HuggingFaceDataset
from data_prep.records import PrepareError, SourceOptions, TextSource, document
from data_prep.sources import text_sources

TEXTS = ["first é\nline", "", "second 漢字 \U0001f600", "third"]


def texts(sources: list[TextSource]) -> list[str]:
    return [document(record)[0] for source in sources for record in source.records()]


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, values: pyarrow.Array, column: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({column: values}), path)
    return path


def test_every_format_gives_the_same_documents_and_its_whole_size_as_progress(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": 1} for text in TEXTS])
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(jsonl.read_bytes()))
    crawl = tmp_path / "c.json.gz"
    crawl.write_bytes(zipped.read_bytes())
    parquet = write_parquet(tmp_path / "a.parquet", pyarrow.array(TEXTS))
    text = tmp_path / "a.txt"
    text.write_text("<|end|>".join(TEXTS), encoding="utf-8")
    for path in (jsonl, zipped, crawl, parquet, text):
        sources = text_sources([path], SourceOptions(separator="<|end|>"))
        assert texts(sources) == TEXTS, path
        assert sources[0].total == path.stat().st_size
        assert sum(record.progress for record in sources[0].records()) == sources[0].total, path


def test_a_text_file_without_separator_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x\r\n\ny", encoding="utf-8", newline="")
    assert texts(text_sources([path])) == ["x\r\n\ny"]


def test_separator_across_a_read_block_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one<|end|>two é<|end|>three", encoding="utf-8")
    for block in range(1, 12):
        monkeypatch.setattr("data_prep.streams._READ_BYTES", block)
        assert texts(text_sources([path], SourceOptions(separator="<|end|>"))) == ["one", "two é", "three"]


def test_folders_are_read_recursively_in_sorted_order_and_other_files_are_left(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("z")
    (tmp_path / "c.md").write_text("c")
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert texts(text_sources([tmp_path])) == ["a", "z", "c"]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert texts(text_sources([tmp_path])) == ["hello", "hello"]


@pytest.mark.parametrize(
    ("name", "contents", "separator", "place"),
    [
        ("a.txt", b"caf\xe9", None, r"a\.txt is not UTF-8: byte 0xe9 at byte offset 3"),
        ("a.txt", b"ok--ok--b\xff", "--", r"a\.txt, document 3 is not UTF-8: byte 0xff at byte offset 9"),
        ("a.txt", b"\xef\xbb\xbfab\xff", None, r"byte 0xff at byte offset 5"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}\n',
            None,
            r"a\.jsonl, line 2 is not UTF-8: byte 0xe9 at byte offset 24",
        ),
    ],
)
def test_text_that_is_not_utf8_is_named_with_file_and_byte_offset_and_can_be_replaced(
    tmp_path: Path, name: str, contents: bytes, separator: str | None, place: str
) -> None:
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(PrepareError, match=place + r".*--invalid-utf8 replace"):
        texts(text_sources([path], SourceOptions(separator=separator)))
    assert texts(text_sources([path], SourceOptions(separator=separator, invalid_utf8="replace")))[-1].endswith(
        "\ufffd"
    )


def test_parquet_text_that_is_not_utf8_is_named_with_its_row(tmp_path: Path) -> None:
    raw = pyarrow.array([b"fine", b"caf\xe9"], type=pyarrow.binary())
    path = write_parquet(tmp_path / "a.parquet", pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers()))
    with pytest.raises(PrepareError, match=r"a\.parquet, row 2 is not UTF-8: byte 0xe9 at byte offset 3"):
        texts(text_sources([path]))
    assert texts(text_sources([path], SourceOptions(invalid_utf8="replace"))) == ["fine", "caf\ufffd"]


def test_half_a_surrogate_pair_is_an_error_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "whole \\ud83d\\ude00"}\n{"text": "half \\ud83d!"}\n')
    with pytest.raises(PrepareError, match=r"a\.jsonl, line 2 holds half a surrogate pair at character 5"):
        texts(text_sources([path]))
    assert texts(text_sources([path], SourceOptions(invalid_utf8="replace"))) == ["whole \U0001f600", "half \ufffd!"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl, line 2 is not JSON"),
        ("[1]", r"line 2 is a JSON list, not an object"),
        ('{"body": "x", "id": 1}', r"line 2 has no field 'text' but \['body', 'id'\]; choose another field"),
        ('{"text": 3}', r"line 2: 'text' is int, not text"),
        ('{"text": null}', r"line 2: 'text' is NoneType, not text"),
    ],
)
def test_bad_json_lines_are_named_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(PrepareError, match=message):
        texts(text_sources([path]))


def test_damaged_gzip_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress(b"text " * 1000)
    for contents in (whole[:-20], b"not gzip", whole[:15] + b"\xff\xff" + whole[17:]):
        path.write_bytes(contents)
        with pytest.raises(PrepareError, match=r"a\.txt\.gz is a damaged \.gz file"):
            texts(text_sources([path]))


def test_parquet_columns_are_checked_and_null_is_empty(tmp_path: Path) -> None:
    numbers = write_parquet(tmp_path / "n.parquet", pyarrow.array([1]))
    with pytest.raises(PrepareError, match=r"column 'text' is int64, not text"):
        texts(text_sources([numbers]))
    body = write_parquet(tmp_path / "b.parquet", pyarrow.array(["x", None]), column="body")
    with pytest.raises(PrepareError, match=r"no column 'text'; choose one of \['body'\]"):
        texts(text_sources([body]))
    assert texts(text_sources([body], SourceOptions(text_field="body"))) == ["x", ""]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(PrepareError, match=r"bad\.parquet is not a readable Parquet file"):
        texts(text_sources([tmp_path / "bad.parquet"]))


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="absent does not exist"):
        text_sources([tmp_path / "absent"])
    with pytest.raises(PrepareError, match=r"holds no \.txt"):
        text_sources([tmp_path])
    with pytest.raises(PrepareError, match="no input given"):
        text_sources([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separator": ""}, "separator is empty"),
        ({"invalid_utf8": "ignore"}, "invalid_utf8='ignore' is not one of error, replace"),
        ({"languages": ["en"]}, "needs language_field"),
        ({"min_characters": -1}, "not >= 0"),
        ({"min_characters": 5, "max_characters": 4}, "max_characters=4 is below min_characters=5"),
        ({"largest_bytes": 0}, "largest_bytes=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        SourceOptions(**options)  # type: ignore[arg-type]


def test_hugging_face_dataset_on_disk_gives_its_rows(tmp_path: Path) -> None:
    import datasets

    single = datasets.Dataset.from_dict({"text": [*TEXTS, None], "id": [0, 1, 2, 3, 4]})
    single.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"train": single, "test": single.select([0])}).save_to_disk(str(tmp_path / "both"))
    source = HuggingFaceDataset(str(tmp_path / "single"))
    assert texts([source]) == [*TEXTS, ""]
    assert (source.total, source.unit) == (5, "doc")
    assert texts([HuggingFaceDataset(str(tmp_path / "both"), split="test")]) == TEXTS[:1]
    with pytest.raises(PrepareError, match=r"no split 'dev'; pass --split, one of \['test', 'train'\]"):
        HuggingFaceDataset(str(tmp_path / "both"), split="dev")
    with pytest.raises(PrepareError, match=r"no field 'body'; choose one of \['text', 'id'\]"):
        HuggingFaceDataset(str(tmp_path / "single"), SourceOptions(text_field="body"))
    with pytest.raises(PrepareError, match="row 1: 'id' is int, not text"):
        texts([HuggingFaceDataset(str(tmp_path / "single"), SourceOptions(text_field="id"))])


def test_hugging_face_loader_reads_a_folder_of_data_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in TEXTS])
    assert texts([HuggingFaceDataset(str(tmp_path))]) == TEXTS


def test_unknown_hugging_face_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="cannot be loaded"):
        HuggingFaceDataset(str(tmp_path / "nothing" / "here"))
