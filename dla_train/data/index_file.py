"""A Megatron `.idx`, which says where each document of a `.bin` lies: written, and read with checks.

The format is Megatron-LM's indexed dataset, version 1: a header, then int32 lengths and int64 byte positions of
sequences, then int64 document edges. It is read here with NumPy, in pieces: the index of 25 million documents is half
a gigabyte, of which 4 bytes a document stay in memory. Every count in it is held against the file's size before memory
is asked for, so a corrupt one cannot take more than its own bytes.
"""

from __future__ import annotations

import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dla_train.data.errors import TokenFileError

HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, sequences, document edges."""
REMAKE = "copy it again from where it was made, or write it again with `dla-prepare tokens --overwrite`"
_MAGIC = b"MMIDIDX\x00\x00"
_TOKEN_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # codes 6 and 7 are floats
_PIECE = 1 << 20


@dataclass(frozen=True)
class TokenIndex:
    """The documents of one `.bin` that hold tokens."""

    dtype: np.dtype[np.integer]
    """Type of a token in the `.bin`."""
    tokens: int
    """Tokens in the `.bin`."""
    lengths: NDArray[np.integer]
    """Tokens of each document, [documents], int32 (int64 where a document is joined from several sequences)."""
    byte_starts: NDArray[np.int64]
    """First byte of each document in the `.bin`, [documents]; a map of the file where that is possible."""


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype[np.integer]
    sequences: int
    edges: int


def read_index(path: Path) -> TokenIndex:
    """Read and check an `.idx`. Raises TokenFileError if it is not one, is truncated, or contradicts itself."""
    header = _read_header(path)
    lengths, tokens = _read_lengths(path, header)
    if _one_sequence_per_document(path, header) and (not len(lengths) or lengths.min() > 0):
        starts: NDArray[np.int64] = np.empty(0, np.int64)
        if header.sequences:
            offset = HEADER.size + 4 * header.sequences
            mapped = np.memmap(path, dtype="<i8", mode="r", offset=offset, shape=(header.sequences,))
            starts = mapped.view(np.ndarray)
        return TokenIndex(header.dtype, tokens, lengths, starts)
    edges = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[_read_edges(path, header, 0, header.edges)]
    joined = np.diff(edges)
    return TokenIndex(header.dtype, tokens, joined[joined > 0], edges[:-1][joined > 0] * header.dtype.itemsize)


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """Type of the tokens that are written for a vocabulary: megatron-core's choice."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def write_index(path: Path, dtype: np.dtype[np.integer], lengths: array[int]) -> None:
    """Write the `.idx` of documents of `lengths` tokens that lie one after another, each of one sequence."""
    sizes = np.array(lengths, dtype="<i4")
    ends = np.cumsum(sizes, dtype="<i8")
    code = {name: code for code, name in _TOKEN_TYPES.items()}[dtype.str]
    with path.open("wb") as stream:
        stream.write(HEADER.pack(_MAGIC, 1, code, len(sizes), len(sizes) + 1))
        for part in (sizes, (ends - sizes) * dtype.itemsize, np.arange(len(sizes) + 1, dtype="<i8")):
            part.tofile(stream)


def _read_header(path: Path) -> _Header:
    with path.open("rb") as stream:
        raw = stream.read(HEADER.size)
        size = os.fstat(stream.fileno()).st_size
    if len(raw) < HEADER.size or not raw.startswith(_MAGIC):
        raise TokenFileError(f"{path} does not begin as a Megatron index: truncated or not an .idx; {REMAKE}")
    _, version, code, sequences, edges = HEADER.unpack(raw)
    if version != 1 or code not in _TOKEN_TYPES:
        raise TokenFileError(
            f"{path} has version {version} and token type {code}; version 1 with an integer type is required; {REMAKE}"
        )
    expected = HEADER.size + 12 * sequences + 8 * edges
    if size != expected:
        raise TokenFileError(
            f"{path} has {size} bytes, its header describes {expected}: truncated or corrupt; {REMAKE}"
        )
    if edges == 0:
        raise TokenFileError(f"{path} ends its last document nowhere: corrupt; {REMAKE}")
    return _Header(np.dtype(_TOKEN_TYPES[code]), sequences, edges)


def _read_lengths(path: Path, header: _Header) -> tuple[NDArray[np.int32], int]:
    """Lengths of all sequences, and their sum; the byte positions are compared with the lengths on the way."""
    lengths = np.fromfile(path, dtype="<i4", offset=HEADER.size, count=header.sequences)
    pointers = HEADER.size + 4 * header.sequences
    tokens = 0
    for begin in range(0, header.sequences, _PIECE):
        part = lengths[begin : begin + _PIECE]
        if part.min() < 0:
            raise TokenFileError(f"{path} has document edges or lengths out of order: corrupt; {REMAKE}")
        ends = tokens + np.cumsum(part, dtype=np.int64)
        found = np.fromfile(path, dtype="<i8", offset=pointers + 8 * begin, count=len(part))
        if not np.array_equal(found, (ends - part) * header.dtype.itemsize):
            raise TokenFileError(f"{path} points at places that are not one after another: corrupt; {REMAKE}")
        tokens = int(ends[-1])
    return lengths, tokens


def _one_sequence_per_document(path: Path, header: _Header) -> bool:
    """Check the document edges; whether they are 0, 1, 2, ..., as they are unless documents have several sequences."""
    plain, last = header.edges == header.sequences + 1, 0
    for begin in range(0, header.edges, _PIECE):
        edges = _read_edges(path, header, begin, min(_PIECE, header.edges - begin))
        if (begin == 0 and edges[0] != 0) or edges[0] < last or (np.diff(edges) < 0).any():
            raise TokenFileError(f"{path} has document edges or lengths out of order: corrupt; {REMAKE}")
        plain = plain and np.array_equal(edges, np.arange(begin, begin + len(edges)))
        last = int(edges[-1])
    if last != header.sequences:
        raise TokenFileError(f"{path} ends its last document at {last} of {header.sequences}: corrupt; {REMAKE}")
    return plain


def _read_edges(path: Path, header: _Header, begin: int, count: int) -> NDArray[np.int64]:
    offset = HEADER.size + 12 * header.sequences + 8 * begin
    return np.fromfile(path, dtype="<i8", offset=offset, count=count)
