"""Bytes of a text file, `.gz` or `.zst`, in bounded pieces: lines, or what stands between separators.

A compressed file may unpack to far more than the memory there is, and a file of one endless line is no better: nothing
longer than the stated limit is ever held. `.zst` is read by pyarrow, which reports a truncated file; the end of one
passes unnoticed in other readers.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from data_prep.records import PrepareError

COMPRESSED = (".gz", ".zst")
_READ_BYTES = 1 << 20
_UNPACKED_BYTES = 1 << 16  # of a compressed file at once: what is lost before the place where it is damaged


class Piece(NamedTuple):
    """A line or a document's bytes; None if there were more than the limit."""

    data: bytes | None
    offset: int
    """Bytes of the uncompressed stream before it."""


class DamagedStreamError(Exception):
    """A compressed file is truncated or corrupt."""


def uncompressed(raw: IO[bytes], path: Path) -> io.BufferedReader:
    """The contents of an open file, by its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)), _UNPACKED_BYTES)
    if suffix == ".zst":
        pyarrow = import_pyarrow(str(path))[0]
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"), _UNPACKED_BYTES)
    return io.BufferedReader(cast(io.RawIOBase, raw), _READ_BYTES)


def import_pyarrow(name: str) -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. Raises PrepareError naming what to install for the file `name`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise PrepareError(f"{name} needs pyarrow; run `pip install dla-train[huggingface]`") from error
    return pyarrow, parquet


def lines(stream: io.BufferedReader, limit: int) -> Iterator[Piece]:
    """Lines with their ends. Raises DamagedStreamError."""
    offset = 0
    while line := _read(stream.readline, limit + 2):  # "\r\n" does not count
        begin, offset = offset, offset + len(line)
        if len(line.rstrip(b"\r\n")) <= limit:
            yield Piece(line, begin)
            continue
        while line and not line.endswith(b"\n"):
            line = _read(stream.readline, _READ_BYTES)
            offset += len(line)
        yield Piece(None, begin)


def whole(stream: io.BufferedReader, limit: int) -> Iterator[Piece]:
    """The whole stream as one piece. Raises DamagedStreamError."""
    data = _read(stream.read, limit + 1)
    yield Piece(data if len(data) <= limit else None, 0)


def pieces(stream: io.BufferedReader, separator: bytes, limit: int) -> Iterator[Piece]:
    """What stands between separators, which belong to no piece. Raises DamagedStreamError."""
    rest, begin, dropped = b"", 0, 0  # dropped: bytes of the present piece that are held no more
    while block := _read(stream.read1, _READ_BYTES):
        *ended, rest = (rest + block).split(separator)
        for data in ended:
            yield Piece(data if dropped + len(data) <= limit else None, begin)
            begin, dropped = begin + dropped + len(data) + len(separator), 0
        if dropped + len(rest) > limit + len(separator):
            kept = rest[len(rest) - len(separator) + 1 :]  # a separator may have begun
            dropped, rest = dropped + len(rest) - len(kept), kept
    yield Piece(rest if dropped + len(rest) <= limit else None, begin)


def _read(read: Any, size: int) -> bytes:
    try:
        return cast(bytes, read(size))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DamagedStreamError(str(error)) from error
    except OSError as error:
        if error.errno is not None:  # the disk's, not the file's
            raise
        raise DamagedStreamError(str(error)) from error
