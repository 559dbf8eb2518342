"""Documents out of text, JSONL and Parquet files, one at a time.

A source knows its size, so that progress has an ETA, and gives documents in a fixed order. Bytes that are not UTF-8
are an error that names the file and the offset, unless `errors="replace"` was asked for: silently replaced text would
be learnt.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from tqdm import tqdm

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
ROWS_PER_READ = 1000
_READ_BYTES = 1 << 20
_ByteStream = IO[bytes] | gzip.GzipFile
_Piece = TypeVar("_Piece")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class PrepareError(ValueError):
    """Input text, or what was asked of it, cannot be used: names the file, the place and the mend."""


@dataclass(frozen=True)
class Document:
    """One document: its text, and how much of the source's `total` has been read with it (bytes or documents)."""

    text: str
    progress: int


class TextSource(Protocol):
    """Something that gives documents in a fixed order."""

    @property
    def name(self) -> str:
        """For messages and manifests."""
        ...

    @property
    def total(self) -> int:
        """Size in `unit`; the documents' `progress` sums to at most this."""
        ...

    @property
    def unit(self) -> str:
        """`B` (bytes) or `doc`."""
        ...

    def documents(self) -> Iterator[Document]:
        """The documents, in a fixed order."""
        ...


def text_sources(
    paths: Sequence[str | Path], *, text_field: str = "text", separator: str | None = None, errors: str = "strict"
) -> list[TextSource]:
    """Sources of files and folders (read recursively, in sorted order).

    The suffix decides: `.jsonl`/`.json.gz`/`.jsonl.gz` one object per line with `text_field`; `.parquet` a column
    `text_field`; everything else text, one document per file, or cut at `separator`. In folders only these suffixes and
    TEXT_SUFFIXES are taken. Raises PrepareError if a path does not exist or a folder has no such file.
    """
    if errors not in ("strict", "replace"):
        raise PrepareError(f"errors={errors!r} is not `strict` or `replace`")
    if separator == "":
        raise PrepareError("the document separator is empty; leave it out to take a file as one document")
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise PrepareError(f"{path} does not exist")
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _is_text(p))
        if not found:
            raise PrepareError(f"{path} holds no {', '.join(TEXT_SUFFIXES)}, .jsonl or .parquet file")
        files += found
    if not files:
        raise PrepareError("no input given; name text, .jsonl or .parquet files, or folders of them")
    return [_file_source(path, text_field, separator, errors) for path in files]


def progress_bar(sources: Sequence[TextSource], label: str, shown: bool) -> tqdm:
    """A bar over the whole of `sources`, with an ETA if all count in one unit; update it by `Document.progress`."""
    units = {source.unit for source in sources}
    total = sum(source.total for source in sources) if len(units) == 1 else None
    return tqdm(total=total, unit=min(units, default="B"), unit_scale=True, desc=label, disable=not shown)


@dataclass(frozen=True)
class _File:
    """What every file source has: progress counts its bytes on disk."""

    path: Path
    errors: str
    """What to do with text that is not UTF-8: `strict` or `replace`."""

    @property
    def unit(self) -> str:
        """Bytes."""
        return "B"

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def total(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class TextFile(_File):
    """A text file (`.gz` or plain): one document, or several cut at `separator`."""

    separator: str | None

    def documents(self) -> Iterator[Document]:
        """Read in blocks, so a file may be larger than memory if it is cut at a separator."""
        with self.path.open("rb") as raw:
            read = 0
            for data, offset in _readable(_split(_uncompressed(raw, self.path), self.separator), self.name):
                text = _decode(data, self.name, offset, self.errors)
                yield Document(text, raw.tell() - read)
                read = raw.tell()


@dataclass(frozen=True)
class JsonLinesFile(_File):
    """One JSON object per line, the text under `text_field`."""

    text_field: str

    def documents(self) -> Iterator[Document]:
        """One per line; empty lines are skipped."""
        with self.path.open("rb") as raw:
            read = offset = 0
            for number, line in enumerate(_readable(_uncompressed(raw, self.path), self.name), start=1):
                if line.strip():
                    text = _json_text(_decode(line, self.name, offset, self.errors), self.text_field, self.name, number)
                    yield Document(encodable(text, f"{self.name}, line {number}", self.errors), raw.tell() - read)
                    read = raw.tell()
                offset += len(line)


@dataclass(frozen=True)
class ParquetFile(_File):
    """A Parquet file with a string column `text_field`; null is an empty document."""

    text_field: str

    def documents(self) -> Iterator[Document]:
        """One per row; progress is the row's share of the file."""
        pyarrow, parquet = _pyarrow(self.name)
        try:
            file = parquet.ParquetFile(self.path)
        except pyarrow.ArrowInvalid as error:
            raise PrepareError(f"{self.path} is not a readable Parquet file: {error}") from error
        columns = file.schema_arrow.names
        if self.text_field not in columns:
            raise PrepareError(f"{self.path} has no column {self.text_field!r}; pass --text-field, one of {columns}")
        done, rows, total = 0, max(file.metadata.num_rows, 1), self.total
        for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=[self.text_field]):
            column = batch.column(0)
            if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
                raise PrepareError(f"{self.path}: column {self.text_field!r} is {column.type}, not text")
            for value in column.cast(pyarrow.large_binary()).to_pylist():
                done += 1
                text = _decode(value or b"", f"{self.name}, row {done}", 0, self.errors)
                yield Document(text, total * done // rows - total * (done - 1) // rows)


def _is_text(path: Path) -> bool:
    return _plain_suffix(path) in (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def _plain_suffix(path: Path) -> str:
    """Lower-case suffix under a `.gz`; `.json.gz` counts as JSONL, as crawled corpora name it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        if suffixes and suffixes[-1] == ".json":
            return ".jsonl"
    return suffixes[-1] if suffixes else ""


def _file_source(path: Path, text_field: str, separator: str | None, errors: str) -> TextSource:
    suffix = _plain_suffix(path)
    if suffix == ".jsonl":
        return JsonLinesFile(path, errors, text_field)
    if suffix == ".parquet":
        return ParquetFile(path, errors, text_field)
    return TextFile(path, errors, separator)


def _uncompressed(raw: IO[bytes], path: Path) -> _ByteStream:
    return gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw


def _readable(pieces: Iterable[_Piece], name: str) -> Iterator[_Piece]:
    """`pieces`, with damage of a compressed file as a PrepareError."""
    try:
        yield from pieces
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PrepareError(f"{name} is a damaged .gz file ({error}); fetch or compress it again") from error


def _split(stream: _ByteStream, separator: str | None) -> Iterator[tuple[bytes, int]]:
    """Pieces between separators with their byte offsets; the separators belong to no piece."""
    if separator is None:
        yield stream.read(), 0
        return
    mark, rest, offset = separator.encode(), b"", 0
    while block := stream.read(_READ_BYTES):
        *pieces, rest = (rest + block).split(mark)
        for piece in pieces:
            yield piece, offset
            offset += len(piece) + len(mark)
    yield rest, offset


def _decode(data: bytes, name: str, offset: int, errors: str) -> str:
    if offset == 0 and data.startswith(_BYTE_ORDER_MARK):
        data, offset = data[len(_BYTE_ORDER_MARK) :], len(_BYTE_ORDER_MARK)
    try:
        return data.decode("utf-8", errors=errors)
    except UnicodeDecodeError as error:
        raise PrepareError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at byte offset {offset + error.start} "
            f"({error.reason}); convert the file, or pass --errors replace to put U+FFFD in its place"
        ) from error


def encodable(text: str, place: str, errors: str) -> str:
    """`text` if it can be written as UTF-8; JSON escapes can spell half a surrogate pair, a PrepareError at `place`."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise PrepareError(
            f"{place} holds half a surrogate pair at character {error.start}, which is not text; mend it, or pass "
            "--errors replace"
        ) from error
    return text


def _json_text(line: str, field: str, name: str, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise PrepareError(
            f"{name}, line {number} is not JSON ({error}); one JSON object per line is needed"
        ) from error
    if not isinstance(record, dict) or field not in record:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise PrepareError(f"{name}, line {number} has no field {field!r} but {keys}; pass --text-field")
    text = record[field]
    if not isinstance(text, str):
        raise PrepareError(f"{name}, line {number}: {field!r} is {type(text).__name__}, not text; pass --text-field")
    return text


def _pyarrow(name: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise PrepareError(f"{name} needs pyarrow; run `pip install dla-train[huggingface]`") from error
    return pyarrow, parquet
