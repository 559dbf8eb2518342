"""What only reading every token shows: ids outside the vocabulary, exact duplicates, and the hashes of whole files.

Hashes lie in `PREFIX.sha256`, in the format of `sha256sum`, so that `sha256sum -c` checks them too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dla_train.data.errors import DataError, TokenFileError, VocabularyError
from dla_train.data.token_file import TokenFile, token_file_paths

_BLOCK_TOKENS = 1 << 22
_BLOCK_BYTES = 1 << 23


@dataclass(frozen=True)
class Duplicates:
    """Documents of some files that equal an earlier one token for token (by a 64-bit hash)."""

    documents: int
    duplicate_documents: int
    tokens: int
    duplicate_tokens: int


def duplicates(files: list[TokenFile], *, progress: bool = True) -> Duplicates:
    """Count exact duplicates over all documents of `files` together; takes 16 bytes a document."""
    hashes, lengths = [], []
    with tqdm(total=sum(f.tokens for f in files), unit="tok", unit_scale=True, disable=not progress) as bar:
        for file in files:
            for tokens, counts in document_blocks(file):
                ends, whole = np.cumsum(counts).tolist(), tokens.astype("<i8")
                begins = [0, *ends[:-1]]
                digests = b"".join(
                    hashlib.blake2b(whole[begin:end].tobytes(), digest_size=8).digest()
                    for begin, end in zip(begins, ends, strict=True)
                )
                hashes.append(np.frombuffer(digests, dtype="<u8"))
                lengths.append(counts)
                bar.update(len(tokens))
    every, tokens_of = np.concatenate(hashes), np.concatenate(lengths)
    first = np.unique(every, return_index=True)[1]
    total = int(tokens_of.sum())
    return Duplicates(len(every), len(every) - len(first), total, total - int(tokens_of[first].sum()))


def verify(prefix: str, *, record: bool = False, progress: bool = True) -> str:
    """Check a prefix wholly; returns what was found in order. Raises DataError at the first thing that is not.

    Structure (as at every opening), every token id against the manifest's vocabulary, and the sha256 of the files
    against `PREFIX.sha256`. `record` writes that file instead of comparing with it.
    """
    file = TokenFile(prefix)
    _check_ids(file, progress)
    hashes = {path.name: _sha256(path, progress) for path in token_file_paths(prefix) if path.exists()}
    listing = Path(f"{prefix}.sha256")
    found = f"{prefix}: {len(file.lengths):,} documents, {file.tokens:,} tokens in order"
    if record:
        listing.write_text("".join(f"{value}  {name}\n" for name, value in hashes.items()), encoding="utf-8")
        return f"{found}; hashes written to {listing}"
    if not listing.exists():
        return f"{found}; no {listing.name} to compare with (--record writes it)"
    for name, value in _listed(listing).items():
        if hashes.get(name) != value:
            raise TokenFileError(
                f"{listing.with_name(name)} has sha256 {hashes.get(name, 'of no file')}, {listing} says {value}: "
                "changed or damaged since it was recorded; copy it again, or record anew with --record"
            )
    return f"{found}; sha256 as recorded"


def document_blocks(file: TokenFile) -> Iterator[tuple[NDArray[np.integer], NDArray[np.int64]]]:
    """(tokens of some whole documents, tokens of each), in file order, about 4M tokens at a time."""
    begin, ends = 0, np.cumsum(file.lengths, dtype=np.int64)
    while begin < len(ends):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + _BLOCK_TOKENS, side="right")))
        yield file.read(before, int(ends[end - 1]) - before), file.lengths[begin:end].astype(np.int64)
        begin = end


def _check_ids(file: TokenFile, progress: bool) -> None:
    limit = file.manifest.vocab_size if file.manifest else None
    with tqdm(total=file.tokens, unit="tok", unit_scale=True, desc="token ids", disable=not progress) as bar:
        document = 0
        for tokens, counts in document_blocks(file):
            wrong = tokens < 0 if limit is None else (tokens < 0) | (tokens >= limit)
            if wrong.any():
                place = int(np.flatnonzero(wrong)[0])
                document += int(np.searchsorted(np.cumsum(counts), place, side="right"))
                what = "a negative one" if limit is None else f"outside the {limit} of its manifest"
                raise VocabularyError(
                    f"{file.prefix}.bin holds token id {tokens[place]}, {what}, in document {document}; write it again"
                )
            document += len(counts)
            bar.update(len(tokens))


def _sha256(path: Path, progress: bool) -> str:
    digest = hashlib.sha256()
    with (
        path.open("rb") as stream,
        tqdm(
            total=path.stat().st_size, unit="B", unit_scale=True, desc=f"sha256 {path.name}", disable=not progress
        ) as bar,
    ):
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _listed(listing: Path) -> dict[str, str]:
    found = {}
    for line in listing.read_text(encoding="utf-8").splitlines():
        value, separator, name = line.partition("  ")
        if not separator or len(value) != 64:
            raise DataError(f"{listing} is not a list of sha256 sums (`<hash>  <name>` a line); record it anew")
        found[name] = value
    return found
