"""Token files from text: documents kept exactly, splits, policy, workers, and nothing half written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.records import PrepareError, SourceOptions
from data_prep.report import TokensReport
from data_prep.sources import text_sources
from data_prep.train_tokenizer import train_tokenizer
from data_prep.write_tokens import TokenOptions, write_tokens
from dla_train.data.errors import TokenFileError, TokenizerError
from dla_train.data.indexed import TokenFiles
from dla_train.data.manifest import read_manifest
from dla_train.data.tokenizer import load_tokenizer


def write(
    paths: list[Path], output: Path, tokenizer: Path, *, workers: int = 1, overwrite: bool = False, **options: Any
) -> TokensReport:
    sources, chosen = text_sources(paths), TokenOptions(**options)
    return write_tokens(sources, output, tokenizer, chosen, workers=workers, overwrite=overwrite, progress=False)


def decoded(prefix: Path, tokenizer_path: Path) -> list[str]:
    tokenizer, files = load_tokenizer(tokenizer_path), TokenFiles([prefix])
    return [tokenizer.decode(files.read(i).tolist()) for i in range(files.documents)]


def test_documents_come_back_exactly_with_their_policy(text_folder: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    originals = [path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir())]
    tokenizer = load_tokenizer(tokenizer_path)
    for bos, eos in ((False, True), (True, True), (True, False), (False, False)):
        output = tmp_path / f"out{bos}{eos}"
        report = write([text_folder], output, tokenizer_path, bos=bos, eos=eos)
        assert decoded(output, tokenizer_path) == originals
        files = TokenFiles([output], tokenizer=tokenizer, vocab_size=512)
        for i in range(files.documents):
            ids = files.read(i)
            assert (ids[0] == tokenizer.bos_id) == bos and (ids[-1] == tokenizer.eos_id) == eos
            assert tokenizer.eos_id not in ids[1:-1]
        manifest = read_manifest(Path(f"{output}.json"))
        assert (manifest.bos, manifest.eos, manifest.split) == (bos, eos, "all")
        assert manifest.text_bytes == report.splits["all"].text_bytes == sum(len(text.encode()) for text in originals)


def test_split_follows_the_text_not_its_place(text_folder: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    records = [{"text": f"document {i} " * 5} for i in range(300)]
    for name, order in (("a", records), ("b", records[::-1] + records[:50])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in order))
        write([tmp_path / f"{name}.jsonl"], tmp_path / name, tokenizer_path, validation_fraction=0.2)
    held_out = {name: set(decoded(tmp_path / f"{name}_validation", tokenizer_path)) for name in "ab"}
    train = {name: set(decoded(tmp_path / f"{name}_train", tokenizer_path)) for name in "ab"}
    assert held_out["a"] == held_out["b"] and train["a"] == train["b"]
    assert not held_out["a"] & train["a"]
    assert 30 <= len(held_out["a"]) <= 90  # 60 expected, 4 standard deviations
    assert read_manifest(tmp_path / "a_validation.json").split == "validation"


def test_any_number_of_workers_writes_the_same_files(
    text_folder: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.encoding._BATCH_BYTES", 5000)
    write([text_folder], tmp_path / "one", tokenizer_path)
    write([text_folder], tmp_path / "two", tokenizer_path, workers=2)
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_empty_documents_are_left_out_and_counted(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one|  \n|two||")
    report = write_tokens(
        text_sources([path], SourceOptions(separator="|")), tmp_path / "out", tokenizer_path, progress=False
    )
    assert decoded(tmp_path / "out", tokenizer_path) == ["one", "two"]
    assert report.counts == {"kept": 2, "empty": 3}


def test_empty_corpus_is_an_error_and_writes_nothing(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(" \n")
    with pytest.raises(PrepareError, match=r"no text in .*empty\.txt: nothing was written \(1 empty\)"):
        write([path], tmp_path / "out", tokenizer_path)
    assert list(tmp_path.iterdir()) == [path]


def test_empty_split_is_an_error(text_folder: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    path = sorted(text_folder.iterdir())[0]
    with pytest.raises(PrepareError, match=r"split of .* is empty with validation_fraction=0\.5.*--separator"):
        write([path], tmp_path / "out", tokenizer_path, validation_fraction=0.5)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_text_in_the_middle_leaves_no_file_behind(tokenizer_path: Path, tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("fine")
    (folder / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(PrepareError, match=r"b\.txt is not UTF-8"):
        write([folder], tmp_path / "out", tokenizer_path, workers=workers, validation_fraction=0.5)
    assert list(tmp_path.iterdir()) == [folder]


def test_existing_outputs_are_kept_unless_overwrite_is_asked(
    text_folder: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    write([text_folder], tmp_path / "out", tokenizer_path)
    before = (tmp_path / "out.bin").read_bytes()
    with pytest.raises(TokenFileError, match=r"out\.bin.* exists already"):
        write([text_folder], tmp_path / "out", tokenizer_path, bos=True)
    assert (tmp_path / "out.bin").read_bytes() == before
    write([text_folder], tmp_path / "out", tokenizer_path, bos=True, overwrite=True)
    assert len(decoded(tmp_path / "out", tokenizer_path)) == 20
    assert read_manifest(tmp_path / "out.json").bos
    assert not list(tmp_path.glob("*.partial"))


def test_a_second_output_that_exists_leaves_no_trace_of_the_first(
    text_folder: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "out_validation.bin").write_bytes(b"")
    with pytest.raises(TokenFileError, match="exists already"):
        write([text_folder], tmp_path / "out", tokenizer_path, validation_fraction=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["out_validation.bin"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "not in"),
        ({"validation_fraction": -0.1}, "not in"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_options_out_of_range_are_refused(
    text_folder: Path, tokenizer_path: Path, tmp_path: Path, options: dict[str, float], message: str
) -> None:
    with pytest.raises(PrepareError, match=message):
        write([text_folder], tmp_path / "out", tokenizer_path, **options)


def test_bos_without_a_bos_token_is_refused(text_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<|end|>": 0, "<|unknown|>": 1}, unk_token="<|unknown|>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>").save_pretrained(tmp_path / "words")
    with pytest.raises(TokenizerError, match="words has no BOS token; pass --no-bos"):
        write([text_folder], tmp_path / "out", tmp_path / "words", bos=True)
    write([text_folder], tmp_path / "out", tmp_path / "words")
    assert TokenFiles([tmp_path / "out"]).read(0)[-1] == 0


def test_tokenizer_training_is_deterministic_and_samples_within_its_budget(text_folder: Path, tmp_path: Path) -> None:
    sources = text_sources([text_folder])
    first = train_tokenizer(sources, tmp_path / "a.model", 400, sample_megabytes=0.03, progress=False)
    second = train_tokenizer(sources, tmp_path / "b.model", 400, sample_megabytes=0.03, progress=False)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert 0.01e6 < first.sample_bytes <= 0.03e6
    assert first.bytes_per_token > 1.2
    assert load_tokenizer(first.path).vocab_size == 400


def test_sample_is_spread_over_the_text(tmp_path: Path) -> None:
    from data_prep.train_tokenizer import _sample

    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"{i:09d}\n" for i in range(200_000)))
    places = np.array([int(chunk[:9]) for chunk in _sample(text_sources([path]), 400_000, "stop", progress=False)])
    assert np.all(np.diff(places) > 0)
    assert np.histogram(places, bins=4, range=(0, 200_000))[0].min() > 10


@pytest.mark.parametrize(
    ("vocab_size", "output", "options", "message"),
    [
        (10**5, "a.model", {}, r"vocab_size=100000 .*too high.*<= \d+; choose another"),
        (299, "a.model", {}, "vocab_size=299 is below 300"),
        (512, "a.bin", {}, r"a\.bin does not end in \.model"),
        (512, "a.model", {"model_type": "word"}, "model_type='word' is not one of bpe, unigram"),
    ],
)
def test_impossible_tokenizers_are_refused(
    text_folder: Path, tmp_path: Path, vocab_size: int, output: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(PrepareError, match=message):
        train_tokenizer(text_sources([text_folder]), tmp_path / output, vocab_size, progress=False, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_without_text_or_over_another_is_refused(text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(PrepareError, match="no text in the sources"):
        train_tokenizer(text_sources([tmp_path / "empty.txt"]), tmp_path / "a.model", 512, progress=False)
    (tmp_path / "a.model").write_text("mine")
    with pytest.raises(TokenFileError, match="exists already"):
        train_tokenizer(text_sources([text_folder]), tmp_path / "a.model", 512, progress=False)
    assert (tmp_path / "a.model").read_text() == "mine"
