"""Filters and duplicates: what is left out, why, and that it is the same however the work is divided."""

import random
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data_prep.huggingface import HuggingFaceDataset
from data_prep.near_duplicates import NearDuplicates
from data_prep.records import PrepareError, SourceOptions, TextSource, documents
from data_prep.sources import text_sources
from data_prep.write_tokens import TokenOptions, write_tokens
from tests.data_prep.corpora import contents, plain_tokens, stored_tokens, texts, write_jsonl

ROWS = [("en", "short"), ("en", "x" * 10), ("de", "y" * 10), ("fr", "z" * 11), ("en", "w" * 12), ("en", " \n")]


def sources_of(folder: Path, kind: str, options: SourceOptions) -> list[TextSource]:
    nested = [{"text": text, "meta": {"lang": tag}} for tag, text in ROWS]
    if kind == "jsonl":
        return text_sources([write_jsonl(folder / "a.jsonl", list(nested))], options)
    if kind == "dataset":
        import datasets

        datasets.Dataset.from_list(nested).save_to_disk(str(folder / "set"))
        return [HuggingFaceDataset(str(folder / "set"), options)]
    table = pyarrow.table({"text": [text for _, text in ROWS], "meta.lang": [tag for tag, _ in ROWS]})
    parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    return text_sources([folder / "a.parquet"], options)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_length_and_language_are_filtered_in_every_format(kind: str, tokenizer_path: Path, tmp_path: Path) -> None:
    options = SourceOptions(language_field="meta.lang", languages=["en", "fr"], min_characters=6, max_characters=11)
    sources = sources_of(tmp_path, kind, options)
    report = write_tokens(sources, tmp_path / "out", tokenizer_path, progress=False)
    assert stored_tokens(tmp_path / "out") == plain_tokens([ROWS[1][1], ROWS[3][1]], tokenizer_path)
    assert report.counts == {"kept": 2, "too_short": 1, "too_long": 1, "language": 1, "empty": 1}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
@pytest.mark.parametrize("start", range(8))
def test_reading_begins_after_any_record(kind: str, start: int, tmp_path: Path) -> None:
    source = sources_of(tmp_path, kind, SourceOptions())[0]
    whole = list(source.records())
    assert [record.number for record in whole] == [1, 2, 3, 4, 5, 6]
    assert [record[1:] for record in source.records(start)] == [record[1:] for record in whole[start:]]


def test_exact_copies_are_left_out_across_shards_splits_and_sources(tokenizer_path: Path, tmp_path: Path) -> None:
    different = texts(60)
    copied = random.Random(0).choices(different, k=100)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in copied])
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in different])
    sources = text_sources([tmp_path])
    options = TokenOptions(duplicates="exact", shard_tokens=500, validation_fraction=0.2)
    report = write_tokens(sources, tmp_path / "out", tokenizer_path, options, progress=False)
    stored = [tokens for split in report.splits.values() for tokens in stored_tokens(split.prefix)]
    assert sorted(stored) == sorted(plain_tokens(different, tokenizer_path))
    assert report.counts == {"kept": 60, "duplicate": 100}


def words(seed: int, count: int = 200) -> list[str]:
    generator = random.Random(seed)
    return [f"word{generator.randrange(10**6)}" for _ in range(count)]


def near_copy(of: list[str]) -> str:
    """One of 200 words changed: 5 of 196 runs of five words, a Jaccard similarity of 0.95; other case and signs."""
    return "  ".join([*of[:100], "changed", *of[101:]]).upper() + "!"


def test_near_copies_are_left_out_and_different_texts_are_kept(tokenizer_path: Path, tmp_path: Path) -> None:
    originals = [words(seed) for seed in range(40)]
    half = [" ".join([*one[:100], *words(99)[:100]]) for one in originals[:5]]  # half of it is new to every text
    records = [" ".join(one) for one in originals] + [near_copy(one) for one in originals] + half[:1]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in [*records, "?!", "!?", "one", "two"]])
    written = []
    for workers in (1, 2):
        options = TokenOptions(duplicates="near", shard_tokens=10_000)
        sources = text_sources([tmp_path / "a.jsonl"])
        output = tmp_path / str(workers) / "out"
        report = write_tokens(sources, output, tokenizer_path, options, workers=workers, progress=False)
        assert report.counts["kept"] >= 40 + 1 + 4 and report.counts["near_duplicate"] >= 36
        assert report.counts["kept"] + report.counts["near_duplicate"] == len(records) + 4
        written.append(contents(output.parent, "out"))
    assert written[0] == written[1]


@pytest.mark.parametrize(("changed", "least", "most"), [(1, 0.9, 1.0), (100, 0.0, 0.05)])
def test_the_chance_to_be_taken_for_a_copy_follows_the_threshold(changed: int, least: float, most: float) -> None:
    near, found = NearDuplicates(0.8), 0
    for seed in range(40):
        one = words(seed)
        other = [*words(1000 + seed)[:changed], *one[changed:]]
        found += not set(near.bands(" ".join(one))).isdisjoint(near.bands(" ".join(other)))
    assert least <= found / 40 <= most


def test_a_missing_datasketch_and_a_wrong_threshold_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PrepareError, match=r"similarity=1\.5 is not between 0 and 1"):
        NearDuplicates(1.5)
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(PrepareError, match=r"pip install dla-train\[dedup\]`, or take --duplicates exact"):
        NearDuplicates(0.8)


@pytest.mark.parametrize(
    ("record", "message"),
    [({"text": "a"}, r"line 1 has no field 'meta'"), ({"text": "a", "meta": {"lang": 3}}, r"'meta\.lang' is int")],
)
def test_a_missing_or_wrong_language_is_a_fault(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = SourceOptions(language_field="meta.lang", languages=["en"])
    source = text_sources([write_jsonl(tmp_path / "a.jsonl", [record])], options)[0]
    with pytest.raises(PrepareError, match=message):
        list(documents(source))
    assert list(documents(source, "skip")) == []
