"""Megatron `.bin/.idx` token files: checked opening, vectorised reading, atomic writing.

The format is Megatron-LM's indexed dataset (uint16 tokens for vocabularies under 65,500, else int32), byte for byte
what megatron-core's builder writes, so that files travel both ways. Neither way goes through it: its import takes
seconds, its reader fails with bare assertions, or takes a truncated `.bin` without complaint until the missing tokens
are asked for. Opening is token_file.py's; what stays in memory is 4 bytes a document.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dla_train.data.errors import CorpusTooSmallError, TokenFileError, TokenizerError, VocabularyError
from dla_train.data.index_file import token_dtype, write_index
from dla_train.data.manifest import Manifest
from dla_train.data.shard_list import expand_prefixes
from dla_train.data.token_file import TokenFile, token_file_paths
from dla_train.data.tokenizer import Tokenizer

_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 4096
_PIECE = 1 << 20


class TokenFiles:
    """One or more `.bin/.idx` pairs, opened as one sequence of documents (in the order of `prefixes`).

    A prefix of many shards stands for them all (shard_list.py). Documents without tokens are left out. Raises
    TokenFileError (missing, truncated, corrupt), CorpusTooSmallError (no tokens), TokenizerError (manifest names
    another tokenizer), VocabularyError (ids beyond `vocab_size`).
    """

    def __init__(
        self, prefixes: Sequence[str | Path], *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
    ) -> None:
        if not prefixes:
            raise CorpusTooSmallError("no token files given; set data.train to the prefixes of .bin/.idx pairs")
        self.prefixes = expand_prefixes(prefixes)
        self.files = [TokenFile(prefix) for prefix in self.prefixes]
        """The pairs, in the order of `prefixes`."""
        for file in self.files:
            _check_manifest(file.prefix, file.manifest, tokenizer, vocab_size)
        self._vocab_size = vocab_size
        parts = [file.lengths for file in self.files]
        self.document_lengths: NDArray[np.integer] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        """Tokens of each document, [documents] int32 (int64 for documents of several sequences), all at least 1."""
        self._first = np.cumsum([0] + [len(part) for part in parts])
        for file, begin, end in zip(self.files, self._first, self._first[1:], strict=False):
            file.lengths = self.document_lengths[begin:end]  # one copy of them
        self.tokens = sum(file.tokens for file in self.files)
        """Number of tokens."""
        self.manifests: list[Manifest | None] = [file.manifest for file in self.files]
        """Manifest of each prefix; None where a file has none."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_lengths)

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

        Blocks, not the whole: a terabyte cannot be hashed at every start (`dla-data verify` does).
        """
        digest = hashlib.sha256()
        for file in self.files:
            size, item = file.tokens * file.dtype.itemsize, file.dtype.itemsize
            digest.update(f"{file.dtype} {size} {len(file.lengths)}\n".encode())
            for begin in range(0, len(file.lengths), _PIECE):
                digest.update(file.lengths[begin : begin + _PIECE].astype("<i8").tobytes())
            block = min(_BLOCK_BYTES // item, file.tokens)
            for begin in np.linspace(0, file.tokens - block, _SAMPLED_BLOCKS).astype(np.int64).tolist():
                digest.update(file.read(begin, block).tobytes())
        return digest.hexdigest()

    def read(self, document: int, offset: int = 0, count: int | None = None) -> NDArray[np.int64]:
        """Tokens [offset, offset + count) of one document (count None: to its end), int64."""
        length = int(self.document_lengths[document])
        count = length - offset if count is None else count
        if offset < 0 or count < 0 or offset + count > length:
            raise IndexError(f"tokens {offset}..{offset + count} of document {document}, which has {length}")
        return self.gather(np.array([document]), np.array([offset]), np.array([count]))

    def gather(
        self, documents: NDArray[np.integer], offsets: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Concatenated pieces: for each i, tokens [offsets[i], offsets[i] + counts[i]) of documents[i]. [sum(counts)]
        int64.

        Bounds are the caller's. Raises VocabularyError, naming file and document, for an id outside the vocabulary.
        """
        ends = np.cumsum(counts)
        result = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int64)
        file_of = np.searchsorted(self._first, documents, side="right") - 1
        begins = np.empty(len(documents), dtype=np.int64)
        for index in np.unique(file_of):
            file, chosen = self.files[index], file_of == index
            starts = file.byte_starts[documents[chosen] - self._first[index]]
            begins[chosen] = starts // file.dtype.itemsize + offsets[chosen]
        pieces = zip(file_of.tolist(), begins.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
        for index, begin, at, end in pieces:
            result[at:end] = self.files[index].read(begin, end - at)
        if self._vocab_size is not None and len(result):
            self._check_vocabulary(result, self._vocab_size, documents, counts)
        return result

    def _check_vocabulary(
        self, tokens: NDArray[np.int64], size: int, documents: NDArray[np.integer], counts: NDArray[np.int64]
    ) -> None:
        if tokens.min() >= 0 and tokens.max() < size:
            return
        place = int(np.flatnonzero((tokens < 0) | (tokens >= size))[0])
        document = int(documents[np.searchsorted(np.cumsum(counts), place, side="right")])
        index = int(np.searchsorted(self._first, document, side="right")) - 1
        raise VocabularyError(
            f"{self.prefixes[index]}.bin holds token id {tokens[place]} in document {document - self._first[index]}, "
            f"but model.vocab_size={size}; use the tokenizer the files were written with, or a larger model.vocab_size"
        )


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
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._lengths: array[int] = array("i")
        self._bin = self._temporary[0].open("wb")
        self.tokens = 0

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def add(self, ids: Sequence[int] | NDArray[np.integer]) -> None:
        """Append one document (at least one token, ids in [0, vocab_size))."""
        tokens = np.asarray(ids)
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise VocabularyError(
                f"{self.prefix}: document {self.documents} is empty or has an id outside [0, {self._vocab_size})"
            )
        self._bin.write(tokens.astype(self._dtype).tobytes())
        self._lengths.append(tokens.size)
        self.tokens += int(tokens.size)

    def commit(self, manifest: Manifest) -> None:
        """Flush to disk, write the manifest, and rename the three files into place."""
        self._bin.close()
        write_index(self._temporary[1], self._dtype, self._lengths)
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
