"""Records out of text, JSONL and Parquet files, in a fixed order.

A source knows its size, so that progress has an ETA, and can begin after any record, so that a killed run goes on. A
damaged compressed file gives what can be read of it, then one record that says what is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.records import PrepareError, Record, RecordError, RecordForm, SourceOptions, TextSource
from data_prep.streams import COMPRESSED, DamagedStreamError, Piece, import_pyarrow, lines, pieces, uncompressed, whole

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
ROWS_PER_READ = 64
"""Rows of Parquet and datasets held at once: a thousand books would be a gigabyte."""


def text_sources(paths: Sequence[str | Path], options: SourceOptions | None = None) -> list[TextSource]:
    """Sources of files and folders (read recursively, in sorted order).

    The suffix decides: `.jsonl` one object per line; `.parquet` a column; everything else text, one document per file
    or cut at the separator. `.gz` and `.zst` may follow; `.json.gz` and `.json.zst` count as JSONL, as crawled corpora
    name it. In folders only these suffixes and TEXT_SUFFIXES are taken. Raises PrepareError if a path does not exist
    or a folder has no such file.
    """
    options = options or SourceOptions()
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise PrepareError(f"{path} does not exist; name text, .jsonl or .parquet files, or folders of them")
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _is_text(p))
        if not found:
            raise PrepareError(f"{path} holds no {', '.join(TEXT_SUFFIXES)}, .jsonl or .parquet file")
        files += found
    if not files:
        raise PrepareError("no input given; name text, .jsonl or .parquet files, or folders of them")
    return [_file_source(path, options) for path in files]


@dataclass(frozen=True)
class _File:
    """What every file source has: progress counts its bytes on disk."""

    path: Path
    options: SourceOptions

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

    @property
    def identity(self) -> list[str | int]:
        """Path, size and time of the last change."""
        status = self.path.stat()
        return [self.name, status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class TextFile(_File):
    """A text file: one document, or several cut at the separator."""

    def records(self, start: int = 0) -> Iterator[Record]:
        """Documents, not decoded."""
        form, mark = RecordForm(self.name, "document", False, self.options), self.options.separator
        limit = self.options.largest_bytes
        if mark is None:
            return _stream_records(self.path, form, start, lambda stream: whole(stream, limit))
        return _stream_records(self.path, form, start, lambda stream: pieces(stream, mark.encode(), limit))


@dataclass(frozen=True)
class JsonLinesFile(_File):
    """One JSON object per line."""

    def records(self, start: int = 0) -> Iterator[Record]:
        """Lines, not decoded; blank ones are counted but give no record."""
        form, limit = RecordForm(self.name, "line", True, self.options), self.options.largest_bytes
        return _stream_records(self.path, form, start, lambda stream: lines(stream, limit))


@dataclass(frozen=True)
class ParquetFile(_File):
    """A Parquet file with a string column; null is an empty document."""

    def records(self, start: int = 0) -> Iterator[Record]:
        """Rows; progress is the row's share of the file. Raises PrepareError for a file without the columns."""
        pyarrow, parquet = import_pyarrow(self.name)
        form, options = RecordForm(self.name, "row", False, self.options), self.options
        done = start
        try:
            file = parquet.ParquetFile(self.path)
            columns = [options.text_field, *([options.language_field] if options.languages else [])]
            self._check_columns(file, columns, pyarrow)
            rows, total = max(file.metadata.num_rows, 1), self.total
            for row in _parquet_rows(file, columns, start, pyarrow):
                done += 1
                progress = total * done // rows - total * (done - 1) // rows
                tag = row[1].decode("utf-8", "replace") if len(row) > 1 and row[1] is not None else None
                yield Record(form, within(row[0] or b"", done, form), tag, done, 0, progress)
        except (pyarrow.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            message = f"{self.path} is not a readable Parquet file after row {done}: {error}; fetch it again"
            yield Record(form, RecordError("damaged", message), None, done + 1, 0, 0)

    def _check_columns(self, file: Any, columns: list[str], pyarrow: Any) -> None:
        schema = file.schema_arrow
        for column in columns:
            if column not in schema.names:
                raise PrepareError(f"{self.path} has no column {column!r}; choose one of {schema.names}")
            kind = schema.field(column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise PrepareError(f"{self.path}: column {column!r} is {kind}, not text; choose another")


def _parquet_rows(file: Any, columns: list[str], start: int, pyarrow: Any) -> Iterator[tuple[bytes | None, ...]]:
    """Rows from `start` on; row groups before it are not read."""
    groups, skipped = list(range(file.metadata.num_row_groups)), 0
    while groups and skipped + file.metadata.row_group(groups[0]).num_rows <= start:
        skipped += file.metadata.row_group(groups.pop(0)).num_rows
    if not groups:
        return
    for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=columns, row_groups=groups):
        values = [batch.column(name).cast(pyarrow.large_binary()).to_pylist() for name in columns]
        yield from list(zip(*values, strict=True))[max(start - skipped, 0) :]
        skipped += batch.num_rows


def _stream_records(
    path: Path, form: RecordForm, start: int, cut: Callable[[Any], Iterator[Piece]]
) -> Iterator[Record]:
    """Records of a stream of bytes; those before `start` are read past, which costs a small part of tokenising them."""
    number = read = 0
    with path.open("rb", buffering=0) as raw, uncompressed(raw, path) as stream:
        try:
            for number, piece in enumerate(cut(stream), start=1):
                at = raw.tell()
                if number > start:
                    if form.json and piece.data is not None and not piece.data.strip():
                        continue
                    payload = piece.data if piece.data is not None else oversized(number, form)
                    yield Record(form, payload, None, number, piece.offset, at - read)
                read = at
        except DamagedStreamError as error:
            if number >= start:
                lost = f"after {form.unit} {number} at byte {raw.tell()} of {path.stat().st_size}"
                message = f"{path} is a damaged {path.suffix} file ({error}) {lost}; fetch or compress it again"
                yield Record(form, RecordError("damaged", message), None, number + 1, 0, 0)


def within(data: bytes, number: int, form: RecordForm) -> bytes | RecordError:
    """`data`, or the error if it is larger than a record may be."""
    return data if len(data) <= form.options.largest_bytes else oversized(number, form)


def oversized(number: int, form: RecordForm) -> RecordError:
    """What is wrong with a record that is too large to be held."""
    rule = f"has more than {form.options.largest_bytes} bytes; raise --largest-megabytes"
    separator = ", or cut the text with --separator" if form.unit == "document" else ""
    return RecordError("oversized", f"{form.name}, {form.unit} {number} {rule}{separator}")


def _is_text(path: Path) -> bool:
    return _plain_suffix(path) in (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def _plain_suffix(path: Path) -> str:
    """Lower-case suffix under that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".json":
            return ".jsonl"
    return suffixes[-1] if suffixes else ""


def _file_source(path: Path, options: SourceOptions) -> TextSource:
    suffix = _plain_suffix(path)
    if suffix == ".jsonl":
        return JsonLinesFile(path, options)
    if suffix == ".parquet":
        return ParquetFile(path, options)
    return TextFile(path, options)
