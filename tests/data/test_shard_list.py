"""Corpora of many shards: one prefix stands for them, and a set that is not the listed one is an error."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dla_train.data.errors import TokenFileError
from dla_train.data.indexed import TokenFiles
from dla_train.data.shard_list import Shard, expand_prefixes, read_shard_list, shard_list_path, write_shard_list
from dla_train.inspect_data.command import main as dla_data

WriteFiles = Callable[..., str]
FIRST, SECOND = [[5, 6, 7], [1]], [[8, 9]]


@pytest.fixture
def prefix(write_files: WriteFiles) -> str:
    """A corpus `c` of two shards."""
    first, second = write_files(FIRST, "c_00000"), write_files(SECOND, "c_00001")
    corpus = str(Path(first).with_name("c"))
    write_shard_list(corpus, [Shard(Path(first).name, 2, 4, 12), Shard(Path(second).name, 1, 2, 6)])
    return corpus


def test_a_prefix_stands_for_its_shards_in_order_among_others(prefix: str, write_files: WriteFiles) -> None:
    other = write_files([[3]], "other")
    files = TokenFiles([other, prefix])
    assert [files.read(i).tolist() for i in range(files.documents)] == [[3], *FIRST, *SECOND]
    assert files.prefixes == [other, f"{prefix}_00000", f"{prefix}_00001"] == expand_prefixes([other, prefix])
    assert files.fingerprint == TokenFiles([other, f"{prefix}_00000", f"{prefix}_00001"]).fingerprint


def test_the_list_is_read_as_it_was_written(prefix: str) -> None:
    assert [(shard.name, shard.tokens) for shard in read_shard_list(prefix)] == [("c_00000", 4), ("c_00001", 2)]
    assert not list(Path(prefix).parent.glob("*.partial"))


def test_a_missing_a_foreign_and_a_doubled_corpus_are_errors(prefix: str, write_files: WriteFiles) -> None:
    Path(f"{prefix}_00001.bin").unlink()
    with pytest.raises(TokenFileError, match=r"c_00001\.bin does not exist"):
        TokenFiles([prefix])
    for suffix in ("idx", "json"):
        Path(f"{prefix}_00001.{suffix}").unlink()
    write_files([[1, 2, 3]], "c_00001")
    with pytest.raises(TokenFileError, match=r"c_00001\.json says 3 tokens, .*c\.shards\.json says 2: not a shard of"):
        TokenFiles([prefix])
    write_files(FIRST, "c")
    with pytest.raises(TokenFileError, match=r"is both a token file and a list of shards .*; remove the one"):
        TokenFiles([prefix])


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a version 1 list"),
        ('{"format_version": 2, "shards": [{}]}', "not a version 1 list"),
        ('{"format_version": 1, "shards": []}', "not a version 1 list"),
        ('{"format_version": 1, "shards": [{"name": "a"}]}', "an entry that is no shard"),
        ('{"format_version": 1, "shards": [3]}', "an entry that is no shard"),
    ],
)
def test_a_damaged_list_is_an_error(contents: str, message: str, prefix: str) -> None:
    shard_list_path(prefix).write_text(contents)
    with pytest.raises(TokenFileError, match=rf"c\.shards\.json .*{message}.*dla-prepare tokens"):
        TokenFiles([prefix])


@pytest.mark.parametrize(("key", "value"), [("tokens", -1), ("documents", True), ("name", 3), ("text_bytes", "x")])
def test_a_wrong_entry_is_named(key: str, value: object, prefix: str) -> None:
    path = shard_list_path(prefix)
    contents = json.loads(path.read_text())
    contents["shards"][0][key] = value
    path.write_text(json.dumps(contents))
    with pytest.raises(TokenFileError, match=rf"{key}={value!r}"):
        read_shard_list(prefix)


@pytest.mark.parametrize("name", ["../c_00000", "/etc/passwd", "a/b", ".."])
def test_a_shard_elsewhere_is_refused(name: str, prefix: str) -> None:
    path = shard_list_path(prefix)
    contents = json.loads(path.read_text())
    contents["shards"][0]["name"] = name
    path.write_text(json.dumps(contents))
    with pytest.raises(TokenFileError, match="does not lie beside it"):
        read_shard_list(prefix)


def test_dla_data_verifies_every_shard(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dla_data(["verify", prefix]) == 0
    assert capsys.readouterr().out.count("no c_0000") == 2
