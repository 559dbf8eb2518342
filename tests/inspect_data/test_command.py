"""dla-data: what it prints is what the files and the batches hold; damage and mistakes end in a sentence."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.sources import text_sources
from data_prep.train_tokenizer import train_tokenizer
from data_prep.write_tokens import write_tokens
from dla_train.inspect_data.command import main
from tests.data.conftest import numbered_files

TEXTS = ["a short text", "another one, a little longer than the first", "the third", "a short text"] * 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `text` (32 documents of 3 kinds, of 8, 8 and 16 copies), and its tokenizer `small.model`."""
    folder = tmp_path_factory.mktemp("corpus")
    for index, text in enumerate(TEXTS):
        (folder / f"{index:02}.txt").write_text(text, encoding="utf-8")
    sources = text_sources(sorted(folder.glob("*.txt")))
    train_tokenizer(sources, folder / "small.model", 300, progress=False)
    write_tokens(sources, folder / "text", folder / "small.model", progress=False)
    return folder


@pytest.fixture
def settings(corpus: Path) -> list[str]:
    """A run over the corpus as two sources, 6 steps of 4 rows of 16 tokens."""
    return [
        "experiment=quickstart",
        f"data.train=[{{name: a, prefixes: {corpus}/text}}, {{name: b, prefixes: [{corpus}/text]}}]",
        "data.phases=[{start_tokens: 0, weights: {a: 1}}, {start_tokens: 128, weights: {a: 1, b: 3}}]",
        "data.validation=[]",
        f"data.tokenizer={corpus}/small.model",
        "data.context_tokens=16",
        "optim.warmup_steps=0",
        *(f"train.{rule}" for rule in ("steps=6", "global_batch_rows=4", "micro_batch_rows=2", "validation_batches=0")),
        "train.validation_interval_steps=0",
    ]


def test_inspect_prints_documents_tokens_and_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbered_files(tmp_path, [5, 1, 3, 1000])
    numbered_files(tmp_path, [7], "other")
    assert main(["inspect", f"{tmp_path}/numbered", f"{tmp_path}/other"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[1:5] == ["4", "1,009", "int32", "1"]
    assert lines[1].split()[5:] == ["1", "5", "1,000", "1,000", "1,000", "-", "-"]
    assert lines[3].split() == ["sum", "5", "1,016"]


def test_inspect_knows_the_ledger_of_a_run(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *settings, "--at-tokens", "2e2", "--json"]) == 0
    blend = json.loads(capsys.readouterr().out)["blend"]
    ledger = {
        int(at): {name: entry["tokens"] for name, entry in found.items()} for at, found in blend["ledger"].items()
    }
    assert ledger == {
        0: {"a": 0, "b": 0},
        128: {"a": 128, "b": 0},
        256: {"a": 160, "b": 96},  # 200 tokens end inside step 4
        384: {"a": 192, "b": 192},
    }
    assert [phase["weights"] for phase in blend["phases"]] == [{"a": "1"}, {"a": "1/4", "b": "3/4"}]
    assert main(["inspect", *settings]) == 0
    assert "a 0.2500, b 0.7500" in capsys.readouterr().out


def test_stats_counts_exact_duplicates_and_draws_the_lengths(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stats", f"{corpus}/text", "--picture", f"{tmp_path}/lengths.png"]) == 0
    assert "exact duplicates: 29 of 32 documents (90.62%)" in capsys.readouterr().out
    assert (tmp_path / "lengths.png").stat().st_size > 5000
    numbered_files(tmp_path, [40, 2, 3])
    assert main(["stats", f"{tmp_path}/numbered", f"{tmp_path}/numbered"]) == 0  # the second repeats the first
    assert "3 of 6 documents (50.00%), 45 of 90 tokens" in capsys.readouterr().out


def test_verify_finds_a_changed_byte_that_the_structure_does_not_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbered_files(tmp_path, [5, 1, 3])
    prefix = f"{tmp_path}/numbered"
    assert main(["verify", prefix]) == 0 and "no numbered.sha256" in capsys.readouterr().out
    assert main(["verify", prefix, "--record"]) == 0
    assert main(["verify", prefix]) == 0 and "sha256 as recorded" in capsys.readouterr().out
    contents = bytearray(Path(f"{prefix}.bin").read_bytes())
    contents[12] ^= 1
    Path(f"{prefix}.bin").write_bytes(contents)
    assert main(["verify", prefix]) == 1
    assert "numbered.bin has sha256" in capsys.readouterr().out


def test_verify_names_the_document_of_a_token_that_cannot_be(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("bin", "idx", "json"):
        (tmp_path / f"text.{suffix}").write_bytes((corpus / f"text.{suffix}").read_bytes())
    tokens = np.fromfile(tmp_path / "text.bin", dtype="<u2")
    end_of_first = int(np.flatnonzero(tokens == tokens[-1])[0])
    tokens[end_of_first + 2] = 300
    tokens.tofile(tmp_path / "text.bin")
    assert main(["verify", f"{tmp_path}/text"]) == 1
    assert "token id 300, outside the 300 of its manifest, in document 1" in capsys.readouterr().out


def test_sample_shows_the_rows_of_a_step_with_their_documents(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", *settings, "--step", "3", "--rank", "1", "--ranks", "2", "--rows", "9"]) == 0
    out = capsys.readouterr().out
    assert out.count("=== step 3, rank 1 of 2, row ") == 2
    assert "source b: 16 tokens" in out and "ends with EOS" in out and "goes on after the row" in out
    assert "third" in out


def test_sample_shows_padding_and_prefixes_alone(
    corpus: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    packed = [word for word in settings if "phases" not in word and "data.train" not in word]
    train = f"data.train=[{corpus}/text]"
    assert main(["sample", *packed, train, "data.packing=best_fit", "data.context_tokens=64", "--rows", "4"]) == 0
    out = capsys.readouterr().out
    assert "--- padding, tokens " in out and "goes on after the row" not in out
    alone = ["sample", f"{corpus}/text", "--tokenizer", f"{corpus}/small.model", "--context-tokens", "32", "--whole"]
    assert main(alone) == 0
    assert "source train: 32 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere.bin does not exist"),
        (["inspect", "nowhere", "--at-tokens", "5"], "nowhere.bin does not exist"),
        (["inspect", "seed=1", "prefix"], "prefix is a prefix among settings"),
        (["inspect", "sede=1"], "sede is not a setting"),
        (["sample", "nowhere"], "--tokenizer is needed"),
        (["sample", "experiment=quickstart", "--tokenizer", "x"], "--tokenizer goes with prefixes"),
        (["sample", "seed=1", "--step", "-1"], "--step=-1 is negative"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_ledger_of_prefixes_alone_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbered_files(tmp_path, [5, 1, 3])
    assert main(["inspect", f"{tmp_path}/numbered", "--at-tokens", "5"]) == 2
    assert "--at-tokens asks for the ledger of a run" in capsys.readouterr().err
