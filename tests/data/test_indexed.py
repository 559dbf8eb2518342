"""Token files: interoperation with megatron, reading, and every way a file can be broken."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from dla_train.data.errors import CorpusTooSmallError, TokenFileError, TokenizerError, VocabularyError
from dla_train.data.indexed import TokenFiles, TokenFileWriter
from dla_train.data.manifest import Manifest, read_manifest
from dla_train.data.tokenizer import SentencePieceTokenizer

WriteFiles = Callable[..., str]
DOCUMENTS = [[5, 6, 7], [1], [2, 3, 4, 900]]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, np.uint16), (65499, np.uint16), (65500, np.int32)])
def test_megatron_reads_what_is_written(write_files: WriteFiles, vocab_size: int, dtype: type) -> None:
    documents = [*DOCUMENTS, [vocab_size - 1, 0]]
    dataset = IndexedDataset(write_files(documents, vocab_size=vocab_size))
    assert dataset.index.dtype == dtype
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_a_megatron_file_without_manifest_is_read_and_sequences_join_into_documents(
    tmp_path: Path, dtype: type
) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    builder.add_document(np.array([], dtype=dtype), [0])  # an empty document
    builder.add_document(np.array([1, 2, 3, 4, 5]), [2, 3])  # two sequences (sentences) of one document
    builder.add_document(np.array([], dtype=dtype), [0])  # an empty document
    builder.add_document(np.array([6, 7]), [2])
    builder.finalize(str(tmp_path / "m.idx"))
    files = TokenFiles([tmp_path / "m"])
    assert files.document_lengths.tolist() == [5, 2]
    assert files.read(0).tolist() == [1, 2, 3, 4, 5]
    assert files.read(1).tolist() == [6, 7]
    assert files.bytes_per_token is None


def test_several_files_are_one_sequence_of_documents(write_files: WriteFiles) -> None:
    files = TokenFiles([write_files(DOCUMENTS, "a"), write_files([[70000], [8, 9]], "b", vocab_size=80000)])
    assert [files.read(i).tolist() for i in range(files.documents)] == [*DOCUMENTS, [70000], [8, 9]]
    assert files.tokens == 11
    assert files.bytes_per_token == 3.0
    pieces = files.gather(np.array([4, 0, 3, 2]), np.array([1, 0, 0, 2]), np.array([1, 2, 1, 2]))
    assert pieces.tolist() == [9, 5, 6, 70000, 4, 900]
    assert pieces.dtype == np.int64


def test_read_takes_part_of_a_document_and_refuses_to_leave_it(write_files: WriteFiles) -> None:
    files = TokenFiles([write_files(DOCUMENTS)])
    assert files.read(2, 1, 2).tolist() == [3, 4]
    with pytest.raises(IndexError, match="which has 4"):
        files.read(2, 2, 3)


def test_fingerprint_follows_contents_not_paths(write_files: WriteFiles) -> None:
    def fingerprint(*prefixes: str) -> str:
        return TokenFiles(prefixes).fingerprint

    a, same = write_files(DOCUMENTS, "a"), write_files(DOCUMENTS, "same")
    token, edge = (
        write_files([[5, 6, 7], [1], [2, 3, 4, 901]], "token"),
        write_files([[5, 6], [7, 1], [2, 3, 4, 900]], "edge"),
    )
    assert fingerprint(a) == fingerprint(same)
    assert (
        len({fingerprint(a), fingerprint(token), fingerprint(edge), fingerprint(a, token), fingerprint(token, a)}) == 5
    )


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file_is_named(write_files: WriteFiles, suffix: str) -> None:
    prefix = write_files(DOCUMENTS)
    Path(f"{prefix}.{suffix}").unlink()
    with pytest.raises(TokenFileError, match=rf"corpus\.{suffix} does not exist.*dla-prepare"):
        TokenFiles([prefix])


@pytest.mark.parametrize("kept", [0, 2, 15])
def test_truncated_bin_is_an_error(write_files: WriteFiles, kept: int) -> None:
    prefix = write_files(DOCUMENTS)
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(TokenFileError, match=r"corpus\.bin.*copy it again"):
        TokenFiles([prefix])


@pytest.mark.parametrize("kept", [0, 20, 34, 60, -1])
def test_truncated_idx_is_an_error(write_files: WriteFiles, kept: int) -> None:
    prefix = write_files(DOCUMENTS)
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(TokenFileError, match=r"corpus\.idx.*(truncated|index).*copy it again"):
        TokenFiles([prefix])


def test_idx_with_bytes_too_many_is_an_error(write_files: WriteFiles) -> None:
    prefix = write_files(DOCUMENTS)
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes() + struct.pack("<q", 3))
    with pytest.raises(TokenFileError, match=r"corpus\.idx has 110 bytes, its header describes 102"):
        TokenFiles([prefix])


@pytest.mark.parametrize(
    ("offset", "packed", "message"),
    [
        (0, b"X", "does not begin as a Megatron index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, struct.pack("<B", 7), "token type 7"),
        (17, struct.pack("<B", 200), "token type 200"),
        (34, struct.pack("<i", -3), "out of order|one after another"),
        (34, struct.pack("<i", 4), "one after another"),
        (34 + 12, struct.pack("<q", 2), "one after another"),
        (34 + 36, struct.pack("<q", 1), "out of order"),
        (34 + 36 + 8, struct.pack("<q", 3), "out of order"),
        (34 + 36 + 24, struct.pack("<q", 2), "ends its last document at 2 of 3"),
        (34 + 36 + 24, struct.pack("<q", -1), "out of order"),
    ],
)
def test_corrupt_idx_is_an_error(write_files: WriteFiles, offset: int, packed: bytes, message: str) -> None:
    prefix = write_files(DOCUMENTS)
    path = Path(f"{prefix}.idx")
    contents = bytearray(path.read_bytes())
    contents[offset : offset + len(packed)] = packed
    path.write_bytes(contents)
    with pytest.raises(TokenFileError, match=message) as caught:
        TokenFiles([prefix])
    assert "corpus.idx" in str(caught.value)


def test_bin_of_another_file_is_an_error(write_files: WriteFiles) -> None:
    a, b = write_files(DOCUMENTS, "a"), write_files([[1, 2]], "b")
    Path(f"{b}.bin").replace(f"{a}.bin")
    with pytest.raises(TokenFileError, match=r"a\.bin has 4 bytes .* describes 16"):
        TokenFiles([a])


def test_bin_with_bytes_too_many_is_an_error(write_files: WriteFiles) -> None:
    prefix = write_files(DOCUMENTS)
    with Path(f"{prefix}.bin").open("ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(TokenFileError, match=r"corpus\.bin has 18 bytes .* describes 16"):
        TokenFiles([prefix])


def test_negative_lengths_with_pointers_to_match_are_an_error(write_files: WriteFiles) -> None:
    prefix = write_files([[5, 6, 7], [1, 1], [2, 3, 4]])
    path = Path(f"{prefix}.idx")
    contents = bytearray(path.read_bytes())
    contents[34:46] = struct.pack("<3i", 10, -5, 3)
    contents[46:70] = struct.pack("<3q", 0, 20, 10)
    path.write_bytes(contents)
    with pytest.raises(TokenFileError, match=r"corpus\.idx has document edges or lengths out of order"):
        TokenFiles([prefix])


def test_manifest_of_another_file_is_an_error(write_files: WriteFiles) -> None:
    a, b = write_files(DOCUMENTS, "a"), write_files([[1, 2]], "b")
    Path(f"{b}.json").replace(f"{a}.json")
    with pytest.raises(TokenFileError, match=r"a\.json says 2 tokens, .*a\.idx 8"):
        TokenFiles([a])


@pytest.mark.parametrize("contents", ["{", "[]", "{}", '{"format_version": 99}'])
def test_unreadable_manifest_is_an_error(write_files: WriteFiles, contents: str) -> None:
    prefix = write_files(DOCUMENTS)
    Path(f"{prefix}.json").write_text(contents)
    with pytest.raises(TokenFileError, match=r"corpus\.json is not"):
        TokenFiles([prefix])


def test_empty_corpus_is_an_error(tmp_path: Path) -> None:
    IndexedDatasetBuilder(str(tmp_path / "e.bin")).finalize(str(tmp_path / "e.idx"))
    with pytest.raises(CorpusTooSmallError, match=r"e\.bin holds no tokens"):
        TokenFiles([tmp_path / "e"])
    with pytest.raises(CorpusTooSmallError, match=r"data\.train"):
        TokenFiles([])


def test_another_tokenizer_is_refused(write_files: WriteFiles, sentencepiece_tokenizer: SentencePieceTokenizer) -> None:
    right = write_files(DOCUMENTS, "right", fingerprint=sentencepiece_tokenizer.fingerprint)
    TokenFiles([right], tokenizer=sentencepiece_tokenizer)
    wrong = write_files(DOCUMENTS, "wrong", fingerprint="0123456789abcdef")
    with pytest.raises(TokenizerError, match=r"wrong\.bin.*test\.model.*0123456789ab.*data\.tokenizer is small\.model"):
        TokenFiles([right, wrong], tokenizer=sentencepiece_tokenizer)


def test_vocabulary_larger_than_the_model_is_refused(write_files: WriteFiles) -> None:
    prefix = write_files(DOCUMENTS, vocab_size=1000)
    TokenFiles([prefix], vocab_size=1000)
    with pytest.raises(VocabularyError, match=r"up to 999, but model\.vocab_size=999; set .* at least 1000"):
        TokenFiles([prefix], vocab_size=999)


def test_writer_leaves_nothing_behind_when_it_is_abandoned(tmp_path: Path) -> None:
    with pytest.raises(KeyError), TokenFileWriter(tmp_path / "x", 10) as writer:
        writer.add([1, 2])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_to_overwrite_and_keeps_the_old_files(write_files: WriteFiles) -> None:
    prefix = write_files(DOCUMENTS)
    with pytest.raises(TokenFileError, match=r"corpus\.bin.* exists already.*--overwrite"):
        TokenFileWriter(prefix, 1000)
    assert TokenFiles([prefix]).read(0).tolist() == DOCUMENTS[0]


@pytest.mark.parametrize("document", [[], [10], [-1]])
def test_writer_refuses_ids_outside_the_vocabulary(tmp_path: Path, document: list[int]) -> None:
    with TokenFileWriter(tmp_path / "x", 10) as writer, pytest.raises(VocabularyError, match="document 0"):
        writer.add(document)


def test_manifest_returns_from_disk(write_files: WriteFiles) -> None:
    manifest = read_manifest(Path(write_files(DOCUMENTS) + ".json"))
    assert (manifest.documents, manifest.tokens, manifest.bytes_per_token) == (3, 8, 3.0)
    assert isinstance(manifest, Manifest)
