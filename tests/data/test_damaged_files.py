"""Thousands of damaged token files: each is a typed error, or is read as what it says; no crash, no wild allocation."""

import multiprocessing
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dla_train.data import index_file
from dla_train.data.errors import DataError, TokenFileError
from dla_train.data.indexed import TokenFiles
from dla_train.data.row_source import RowSource
from dla_train.data.token_file import token_file_paths

WriteFiles = Callable[..., str]
NUMBERS = [0, 1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def damaged(contents: bytes, rng: np.random.Generator) -> bytes:
    """`contents` with one to three seeded changes: bytes, whole numbers, cuts, insertions, repetitions."""
    data = bytearray(contents)
    for _ in range(rng.integers(1, 4)):
        kind, at = rng.integers(6), int(rng.integers(len(data) + 1))
        if kind == 0 and at < len(data):
            data[at] = rng.integers(256)
        elif kind == 1:
            data[at : at + 8] = struct.pack("<Q", NUMBERS[rng.integers(len(NUMBERS))])[: len(data) - at]
        elif kind == 2:  # a number where the header and the tables have theirs
            at = int(rng.choice([9, 18, 26, *range(34, max(len(data) - 8, 35), 4)]))
            data[at : at + 8] = struct.pack("<Q", NUMBERS[rng.integers(len(NUMBERS))])
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:at] = rng.bytes(int(rng.integers(1, 40)))
        else:
            data[at : at + 16] = data[:16]
    return bytes(data)


def damaged_reads(good: str, trial: str, suffix: str, trials: int) -> tuple[int, int, int]:
    """How many damaged copies of `good` were refused, how many read, and the most bytes that one of them allocated."""
    rng = np.random.default_rng(5)
    contents, path = Path(f"{good}.{suffix}").read_bytes(), Path(f"{trial}.{suffix}")
    RowSource("a", TokenFiles([good]), context_tokens=8, global_batch_rows=4, seed=0).read(0, 1)  # imports, once
    index_file._PIECE = 16  # as a large index, it is read in several pieces
    refused = read = most = 0
    for _ in range(trials):
        path.write_bytes(damaged(contents, rng))
        tracemalloc.start()
        try:
            files = TokenFiles([trial], vocab_size=1000)
            source = RowSource("a", files, context_tokens=8, global_batch_rows=4, seed=0)
            rows = source.read(0, source.rows)
            assert rows.tokens.shape == (source.rows, 9) and rows.tokens.min() >= 0 and rows.tokens.max() < 1000
            assert files.fingerprint
            read += 1
        except DataError as error:
            assert f"trial.{suffix}" in str(error) or "trial.bin" in str(error) or "trial.json" in str(error)
            refused += 1
        finally:
            most = max(most, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    return refused, read, most


@pytest.mark.parametrize("suffix", ["idx", "bin", "json"])
def test_a_damaged_file_is_a_typed_error_or_is_read_as_it_says(
    write_files: WriteFiles, tmp_path: Path, suffix: str
) -> None:
    rng = np.random.default_rng(5)
    good = write_files(
        [rng.integers(0, 900, length).tolist() for length in rng.integers(1, 30, 40)], "good", vocab_size=1000
    )
    trial = str(tmp_path / "trial")
    for source, copy in zip(token_file_paths(good), token_file_paths(trial), strict=True):
        shutil.copy(source, copy)
    # in a process of its own: what a thread or a finalizer of an earlier test allocates here would be counted too
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        refused, read, most = alone.submit(damaged_reads, good, trial, suffix, 1200).result()
    assert refused > 300 and read + refused == 1200
    assert read > 0 or suffix == "idx"
    assert most < 1 << 20, "a file of a kilobyte asked for a megabyte"


def test_a_file_cut_short_while_it_is_open_is_a_typed_error(write_files: WriteFiles) -> None:
    prefix = write_files([list(range(500))])
    files = TokenFiles([prefix])
    os.truncate(f"{prefix}.bin", 300)
    assert files.read(0, 0, 150).tolist() == list(range(150))
    with pytest.raises(TokenFileError, match=r"corpus\.bin ends at byte 300"):
        files.read(0)


def test_a_token_outside_the_vocabulary_is_named_with_its_file_and_document(write_files: WriteFiles) -> None:
    good = write_files([[1, 2], [3]], "good", manifest=False)
    bad = write_files([[1], [2, 3], [4, 900, 5]], "bad", manifest=False)
    with pytest.raises(DataError, match=r"bad\.bin holds token id 900 in document 2, but model\.vocab_size=100"):
        TokenFiles([good, bad], vocab_size=100).gather(np.arange(5), np.zeros(5, int), np.array([2, 1, 1, 2, 3]))


@pytest.mark.parametrize(
    ("key", "value"), [("tokens", '"8"'), ("vocab_size", "null"), ("bos", "1"), ("sources", "[3]"), ("documents", "-1")]
)
def test_a_manifest_value_of_another_type_is_named(write_files: WriteFiles, key: str, value: str) -> None:
    prefix = write_files([[1, 2, 3]])
    import json

    path = Path(f"{prefix}.json")
    contents = json.loads(path.read_text()) | {key: json.loads(value)}
    path.write_text(json.dumps(contents))
    with pytest.raises(TokenFileError, match=rf"corpus\.json has {key}="):
        TokenFiles([prefix])
