"""Documents of pairs that come again: what they hold, that a token is a word, and mistakes."""

import json
from pathlib import Path

import pytest

from data_prep.pairs import PairOptions, single_words, write_pairs
from data_prep.prepare import main
from data_prep.records import PrepareError
from data_prep.sources import text_sources
from data_prep.train_tokenizer import train_tokenizer
from dla_train.data.errors import TokenFileError
from dla_train.data.tokenizer import load_tokenizer

SMALL = PairOptions(documents=60, words=40, least=2, most=8)


def documents(path: Path) -> list[list[str]]:
    return [json.loads(line)["text"].split(" ") for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer_path(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has words."""
    output = tmp_path_factory.mktemp("words") / "words.model"
    return train_tokenizer(text_sources([text_folder]), output, 1200, progress=False).path


@pytest.fixture(scope="module")
def written(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs(path, tokenizer_path, SMALL)
    return path


def test_a_key_has_one_value_in_a_document_and_every_pair_is_given_first(written: Path) -> None:
    sizes = set()
    for words in documents(written):
        assert len(words) == SMALL.words
        pairs = list(zip(words[::2], words[1::2], strict=True))
        value_of = dict(pairs)
        count = len(value_of)
        assert len(set(value_of.values())) == count and not set(value_of) & set(value_of.values())
        assert pairs[:count] == list(value_of.items()) and all(value_of[key] == value for key, value in pairs)
        sizes.add(count)
    assert sizes == set(range(2, 9))


def test_pairs_differ_between_documents_and_keys_are_never_values(written: Path) -> None:
    given = [dict(zip(words[::2], words[1::2], strict=True)) for words in documents(written)]
    keys, values = ({word for part in parts for word in part} for parts in (given, [v.values() for v in given]))
    assert not keys & values
    (key,) = sorted(keys)[:1]
    assert len({pairs[key] for pairs in given if key in pairs}) > 2


def test_a_word_is_a_token(written: Path, tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    assert all(len(tokenizer.encode(" ".join(words))) == SMALL.words for words in documents(written))
    assert len(single_words(tokenizer)) >= 16


def test_the_same_options_give_the_same_documents_and_another_seed_others(
    written: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "same.jsonl", tokenizer_path, SMALL)
    assert (tmp_path / "same.jsonl").read_bytes() == written.read_bytes()
    other = ["pairs", "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "other.jsonl"), "--seed", "1"]
    assert main([*other, "--documents", "60", "--words", "40", "--least", "2", "--most", "8"]) == 0
    assert documents(tmp_path / "other.jsonl") != documents(written)
    with pytest.raises(TokenFileError, match="exists already"):
        write_pairs(tmp_path / "same.jsonl", tokenizer_path, SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PairOptions(documents=0), "--documents=0 is below 1"),
        (PairOptions(least=9, most=8), "--most=8 is below --least=9; raise it"),
        (PairOptions(words=501), "--words=501 is odd, and a pair is two words; give 502"),
        (PairOptions(words=60, most=16), "--words=60 does not hold 16 pairs twice; give 64 or more"),
        (PairOptions(words=4000, most=1000), "words of one token, 1000 pairs need 2000; lower --most"),
    ],
)
def test_options_that_cannot_be_are_refused_and_nothing_is_written(
    tokenizer_path: Path, tmp_path: Path, options: PairOptions, message: str
) -> None:
    with pytest.raises(PrepareError, match=message.replace("(", r"\(")):
        write_pairs(tmp_path / "no.jsonl", tokenizer_path, options)
    assert not list(tmp_path.iterdir())
