"""Megatron `.bin/.idx` token files: checked opening, vectorised reading, atomic writing.

The format is Megatron-LM's indexed dataset (uint16 tokens for vocabularies under 65,500, else int32), read and written
through megatron-core's own classes, so files travel both ways. megatron is imported on first use (seconds) and
only here. Every size is checked before megatron sees a file, because its reader fails with bare assertions, or reads a
truncated `.bin` without complaint until the missing tokens are asked for.
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType, TracebackType

import numpy as np
from numpy.typing import NDArray

from dla_train.data.errors import CorpusTooSmallError, TokenFileError, TokenizerError, VocabularyError
from dla_train.data.manifest import Manifest, read_manifest
from dla_train.data.tokenizer import Tokenizer

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document edges
_MAGIC = b"MMIDIDX\x00\x00"
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # integer dtype codes of megatron's DType; 6 and 7 are floats
_REMAKE = "copy it again from where it was made, or write it again with `dla-prepare tokens --overwrite`"
_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 4096


def token_file_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """Paths of the `.bin`, `.idx` and `.json` (manifest) of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


@dataclass(frozen=True)
class _OpenFile:
    prefix: str
    tokens: NDArray[np.integer]  # all tokens of the file, a view of the memory map
    lengths: NDArray[np.int64]  # tokens of each non-empty document
    starts: NDArray[np.int64]  # first token of each non-empty document
    manifest: Manifest | None
    dataset: object  # keeps the memory map open


class TokenFiles:
    """One or more `.bin/.idx` pairs, opened as one sequence of documents (in the order of `prefixes`).

    Documents without tokens are left out. Raises TokenFileError (missing, truncated, corrupt), CorpusTooSmallError
    (no tokens), TokenizerError (manifest names another tokenizer), VocabularyError (ids beyond `vocab_size`).
    """

    def __init__(
        self, prefixes: Sequence[str | Path], *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
    ) -> None:
        if not prefixes:
            raise CorpusTooSmallError("no token files given; set data.train to the prefixes of .bin/.idx pairs")
        self.prefixes = [str(prefix) for prefix in prefixes]
        self._files = [_open(prefix) for prefix in self.prefixes]
        for file in self._files:
            _check_manifest(file.prefix, file.manifest, tokenizer, vocab_size)
        self.document_lengths: NDArray[np.int64] = np.concatenate([file.lengths for file in self._files])
        """Tokens of each document, [documents] int64, all at least 1."""
        self._starts = np.concatenate([file.starts for file in self._files])
        self._file_of = np.repeat(np.arange(len(self._files)), [len(file.lengths) for file in self._files])
        self.manifests: list[Manifest | None] = [file.manifest for file in self._files]
        """Manifest of each prefix; None where a file has none."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_lengths)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.document_lengths.sum())

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token over all files; None if a file has no manifest to tell."""
        known = [manifest for manifest in self.manifests if manifest is not None]
        if len(known) < len(self.manifests):
            return None
        return sum(m.text_bytes for m in known) / sum(m.tokens for m in known)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over document lengths, token type and 64 blocks spread over each `.bin`; independent of paths.

        Blocks, not the whole: a terabyte cannot be hashed at every start.
        """
        digest = hashlib.sha256()
        for file in self._files:
            raw = file.tokens.view(np.uint8)
            digest.update(f"{file.tokens.dtype} {len(raw)} {len(file.lengths)}\n".encode())
            digest.update(file.lengths.astype("<i8").tobytes())
            for begin in np.linspace(0, max(len(raw) - _BLOCK_BYTES, 0), _SAMPLED_BLOCKS).astype(np.int64):
                digest.update(raw[begin : begin + _BLOCK_BYTES].tobytes())
        return digest.hexdigest()

    def read(self, document: int, offset: int = 0, count: int | None = None) -> NDArray[np.int64]:
        """Tokens [offset, offset + count) of one document (count None: to its end), int64."""
        length = int(self.document_lengths[document])
        count = length - offset if count is None else count
        if offset < 0 or count < 0 or offset + count > length:
            raise IndexError(f"tokens {offset}..{offset + count} of document {document}, which has {length}")
        return self.gather(np.array([document]), np.array([offset]), np.array([count]))

    def gather(
        self, documents: NDArray[np.int64], offsets: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Concatenated pieces: for each i, tokens [offsets[i], offsets[i] + counts[i]) of documents[i]. [sum(counts)]
        int64.

        Bounds are the caller's; one fancy index per file, no Python loop over pieces.
        """
        ends = np.cumsum(counts)
        shift = self._starts[documents] + offsets - (ends - counts)
        positions = np.repeat(shift, counts) + np.arange(ends[-1] if len(ends) else 0)
        if len(self._files) == 1:
            return self._files[0].tokens[positions].astype(np.int64)
        result = np.empty(len(positions), dtype=np.int64)
        file_of = np.repeat(self._file_of[documents], counts)
        for i, file in enumerate(self._files):
            chosen = file_of == i
            result[chosen] = file.tokens[positions[chosen]]
        return result


class TokenFileWriter:
    """Writes one `.bin/.idx/.json` triple under temporary names; `commit` renames it into place, the `.idx` last.

    A context manager: leaving it without `commit` removes the temporary files. Raises TokenFileError if the outputs
    exist and `overwrite` is false.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, *, overwrite: bool = False) -> None:
        self.prefix = str(prefix)
        self._paths = token_file_paths(prefix)
        self._temporary = [path.with_name(path.name + ".partial") for path in self._paths]
        refuse_existing(self._paths, overwrite)
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        module = _megatron_indexed_dataset()
        self._vocab_size = vocab_size
        self._builder = module.IndexedDatasetBuilder(
            str(self._temporary[0]), dtype=module.DType.optimal_dtype(vocab_size)
        )
        self.documents = 0
        self.tokens = 0

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._builder.data_file.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def add(self, ids: Sequence[int] | NDArray[np.integer]) -> None:
        """Append one document (at least one token, ids in [0, vocab_size))."""
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise VocabularyError(
                f"{self.prefix}: document {self.documents} is empty or has an id outside [0, {self._vocab_size})"
            )
        self._builder.add_document(tokens, [tokens.size])
        self.documents += 1
        self.tokens += int(tokens.size)

    def commit(self, manifest: Manifest) -> None:
        """Flush to disk, write the manifest, and rename the three files into place."""
        self._builder.finalize(str(self._temporary[1]))
        manifest.write(self._temporary[2])
        for path in self._temporary:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        self._paths[1].unlink(missing_ok=True)  # while the pair is exchanged there is no .idx: never a mixed pair
        for i in (0, 2, 1):
            self._temporary[i].replace(self._paths[i])


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise TokenFileError if any of `paths` exists and `overwrite` is false."""
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise TokenFileError(f"{', '.join(existing)} exists already; choose another output, or pass --overwrite")


def _megatron_indexed_dataset() -> ModuleType:
    with warnings.catch_warnings():
        # its import warns about absent Apex and Transformer Engine, which token files do not use, and, inside torch,
        # about torch.jit
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def _open(prefix: str) -> _OpenFile:
    bin_path, idx_path, manifest_path = token_file_paths(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise TokenFileError(
                f"{path} does not exist; a token file is a .bin and an .idx, made by `dla-prepare tokens`"
            )
    item_bytes = _check_header(idx_path)
    bin_bytes = bin_path.stat().st_size
    if bin_bytes == 0:  # a .bin without a byte cannot be mapped
        described = np.fromfile(idx_path, dtype="<i4", offset=_HEADER.size, count=_sequence_count(idx_path)).any()
        raise (
            TokenFileError(f"{bin_path} is empty but {idx_path} describes tokens; {_REMAKE}")
            if described
            else CorpusTooSmallError(f"{bin_path} holds no tokens; prepare it from a text that is not empty")
        )
    dataset = _megatron_indexed_dataset().IndexedDataset(prefix)
    sequence_lengths = np.asarray(dataset.sequence_lengths, dtype=np.int64)
    document_edges = np.asarray(dataset.document_indices, dtype=np.int64)
    edges = np.concatenate([[0], np.cumsum(sequence_lengths)])
    _check_index(idx_path, sequence_lengths, dataset.index.sequence_pointers, document_edges, edges * item_bytes)
    if bin_bytes != edges[-1] * item_bytes:
        raise TokenFileError(
            f"{bin_path} has {bin_bytes} bytes but {idx_path} describes {edges[-1] * item_bytes}: truncated or another "
            f"file's; {_REMAKE}"
        )
    starts, lengths = edges[document_edges[:-1]], np.diff(edges[document_edges])
    manifest = read_manifest(manifest_path) if manifest_path.exists() else None
    if manifest is not None and manifest.tokens != edges[-1]:
        raise TokenFileError(f"{manifest_path} says {manifest.tokens} tokens, {idx_path} {edges[-1]}; {_REMAKE}")
    tokens = dataset.bin_reader.read(dtype=dataset.index.dtype, count=int(edges[-1]), offset=0)
    return _OpenFile(prefix, tokens, lengths[lengths > 0], starts[lengths > 0], manifest, dataset)


def _sequence_count(idx_path: Path) -> int:
    with idx_path.open("rb") as stream:
        return int(_HEADER.unpack(stream.read(_HEADER.size))[3])


def _check_header(idx_path: Path) -> int:
    """Check magic, version, type and size of an .idx; returns the bytes of one token."""
    with idx_path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise TokenFileError(f"{idx_path} does not begin as a Megatron index: truncated or not an .idx; {_REMAKE}")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _ITEM_BYTES:
        raise TokenFileError(
            f"{idx_path} has version {version} and token type {code}; version 1 with an integer "
            f"type is required; {_REMAKE}"
        )
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if idx_path.stat().st_size != expected:
        raise TokenFileError(
            f"{idx_path} has {idx_path.stat().st_size} bytes, its header describes {expected}: truncated or corrupt; "
            f"{_REMAKE}"
        )
    with idx_path.open("rb") as stream:  # megatron asserts this one without a word
        stream.seek(-8, os.SEEK_END)
        last_edge = int.from_bytes(stream.read(8), "little", signed=True)
    if documents == 0 or last_edge != sequences:
        raise TokenFileError(f"{idx_path} ends its last document at {last_edge} of {sequences}: corrupt; {_REMAKE}")
    return _ITEM_BYTES[code]


def _check_index(
    idx_path: Path,
    lengths: NDArray[np.int64],
    pointers: NDArray[np.int64],
    document_edges: NDArray[np.int64],
    expected_pointers: NDArray[np.int64],
) -> None:
    if document_edges[0] != 0 or (np.diff(document_edges) < 0).any() or (lengths < 0).any():
        raise TokenFileError(f"{idx_path} has document edges or lengths out of order: corrupt; {_REMAKE}")
    if not np.array_equal(pointers, expected_pointers[:-1]):
        raise TokenFileError(f"{idx_path} points at places that are not one after another: corrupt; {_REMAKE}")


def _check_manifest(
    prefix: str, manifest: Manifest | None, tokenizer: Tokenizer | None, vocab_size: int | None
) -> None:
    if manifest is None:
        return
    if tokenizer is not None and manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise TokenizerError(
            f"{prefix}.bin was written with tokenizer {manifest.tokenizer} (fingerprint "
            f"{manifest.tokenizer_fingerprint[:12]}), but data.tokenizer is {tokenizer.name} "
            f"({tokenizer.fingerprint[:12]}); set data.tokenizer to the one it was written with, or tokenise again"
        )
    if vocab_size is not None and manifest.vocab_size > vocab_size:
        raise VocabularyError(
            f"{prefix}.bin has ids up to {manifest.vocab_size - 1}, but model.vocab_size={vocab_size}; "
            f"set model.vocab_size to at least {manifest.vocab_size}"
        )
