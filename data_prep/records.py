"""One record of input: what a source hands over, how it becomes text, and what can be wrong with it.

Sources read records raw and in order, in one process. Decoding, parsing and filters run where the records are sent, for
they cost most after tokenising: that is what lets one reader feed many processes. What is wrong with a record is a
RecordError with a kind, so it can be counted as well as raised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

FAULTS = ("not_utf8", "not_json", "no_field", "wrong_type", "oversized", "damaged")
"""Kinds of RecordError: records that cannot be used."""
FILTERED = ("empty", "too_short", "too_long", "language", "duplicate", "near_duplicate")
"""Kinds of documents that are left out because they are not wanted."""
INVALID_UTF8 = ("error", "replace")
ON_ERROR = ("stop", "skip")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF8_MEND = "put U+FFFD there with --invalid-utf8 replace, or mend it"
_SKIP = ", or leave such records out with --on-error skip"


class PrepareError(ValueError):
    """Input text, or what was asked of it, cannot be used: names the file, the place and the mend."""


class RecordError(PrepareError):
    """One record cannot be used: its kind (one of FAULTS) and the message, which names file, place and mend.

    As text it says too that such records can be left out; the message alone is for reports of those that were.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)  # both, so that it can be sent between processes
        self.kind, self.message = kind, message

    def __str__(self) -> str:
        return self.message + _SKIP


@dataclass(frozen=True)
class SourceOptions:
    """What to take from a source. Raises PrepareError for a value out of range."""

    text_field: str = "text"
    """Field or column that holds the text."""
    language_field: str = ""
    """Field or column that holds the language's tag; in JSON and datasets `meta.language` is a field of a field."""
    languages: list[str] = field(default_factory=list)
    """Tags to keep; none: all. Needs `language_field`."""
    min_characters: int = 0
    """Shorter documents are left out."""
    max_characters: int = 0
    """Longer documents are left out; 0: no limit."""
    largest_bytes: int = 64 << 20
    """A record (a line, a piece, a file without separator) of more bytes is an error, and is never held in memory."""
    separator: str | None = None
    """Cuts text files into documents; None: a file is one document."""
    invalid_utf8: str = "error"
    """Text that is not UTF-8: `error`, or `replace` what is not by U+FFFD."""

    def __post_init__(self) -> None:
        if self.invalid_utf8 not in INVALID_UTF8:
            raise PrepareError(f"invalid_utf8={self.invalid_utf8!r} is not one of {', '.join(INVALID_UTF8)}")
        if self.separator == "":
            raise PrepareError("the document separator is empty; leave it out to take a file as one document")
        if self.languages and not self.language_field:
            raise PrepareError(f"languages={self.languages} needs language_field, the field that holds the tag")
        if self.min_characters < 0 or self.max_characters < 0:
            raise PrepareError(f"min_characters={self.min_characters}, max_characters={self.max_characters}: not >= 0")
        if self.max_characters and self.max_characters < self.min_characters:
            raise PrepareError(f"max_characters={self.max_characters} is below min_characters={self.min_characters}")
        if self.largest_bytes < 1:
            raise PrepareError(f"largest_bytes={self.largest_bytes} is not at least 1")


@dataclass(frozen=True)
class RecordForm:
    """How the records of one source become documents."""

    name: str
    """The source's name, for messages."""
    unit: str
    """What a record is called: `line`, `row` or `document`."""
    json: bool
    """Whether a record is a line of JSON, else it is the text itself."""
    options: SourceOptions


class Record(NamedTuple):
    """One record, not decoded."""

    form: RecordForm
    payload: bytes | str | RecordError
    """The text, or the line of JSON; or why it cannot be read."""
    language: Any
    """The language's tag where the source has read it already (rows); else None."""
    number: int
    """From 1, in its source."""
    offset: int
    """Bytes of the uncompressed file before it; 0 for rows."""
    progress: int
    """How much of the source's `total` has been read with it."""


class TextSource(Protocol):
    """Something that gives records in a fixed order."""

    @property
    def name(self) -> str:
        """For messages and manifests."""
        ...

    @property
    def options(self) -> SourceOptions:
        """What is taken from it."""
        ...

    @property
    def identity(self) -> list[str | int]:
        """Changes when the source's contents do: what a restart compares."""
        ...

    @property
    def total(self) -> int | None:
        """Size in `unit` (the records' `progress` sums to at most this); None if it is not known."""
        ...

    @property
    def unit(self) -> str:
        """`B` (bytes) or `doc`."""
        ...

    def records(self, start: int = 0) -> Iterator[Record]:
        """The records after the first `start`, in a fixed order."""
        ...


def document(record: Record) -> tuple[str, str | None]:
    """Text of a record, and why it is not wanted (one of FILTERED) or None. Raises RecordError."""
    form, payload, tag = record.form, record.payload, record.language
    if isinstance(payload, RecordError):
        raise payload
    if form.json:
        fields = _json_object(_decoded(payload, record), record)
        payload = _field(fields, form.options.text_field, record)
        if form.options.languages:
            tag = _nested(fields, form.options.language_field, record)
    if not isinstance(payload, (str, bytes)):
        rule = f"{form.options.text_field!r} is {type(payload).__name__}, not text; choose another --text-field"
        raise RecordError("wrong_type", f"{place(record)}: {rule}, or mend it")
    text = _decoded(payload, record)
    return text, _unwanted(text, tag, form.options, record)


def documents(source: TextSource, on_error: str = "stop") -> Iterator[tuple[str, int]]:
    """Text and progress of every wanted document. Raises RecordError unless `on_error` is `skip`."""
    for record in source.records():
        try:
            text, unwanted = document(record)
        except RecordError:
            if on_error == "stop":
                raise
            continue
        if unwanted is None:
            yield text, record.progress


def place(record: Record) -> str:
    """`file, line 3`; a text file that is one document is named alone."""
    alone = record.form.unit == "document" and record.form.options.separator is None
    return record.form.name if alone else f"{record.form.name}, {record.form.unit} {record.number}"


def progress_bar(sources: Sequence[TextSource], label: str, shown: bool, initial: int = 0) -> tqdm:
    """A bar over the whole of `sources`, with an ETA if all sizes are known in one unit; update it by `progress`."""
    units, sizes = {source.unit for source in sources}, [source.total for source in sources]
    total = sum(size or 0 for size in sizes) if len(units) == 1 and None not in sizes else None
    return tqdm(
        total=total, initial=initial, unit=min(units, default="B"), unit_scale=True, desc=label, disable=not shown
    )


def _decoded(data: bytes | str, record: Record) -> str:
    """`data` as text that can be written as UTF-8 (JSON can spell half a surrogate pair)."""
    replace = record.form.options.invalid_utf8 == "replace"
    if isinstance(data, bytes):
        offset = record.offset
        if offset == 0 and data.startswith(_BYTE_ORDER_MARK):
            data, offset = data[len(_BYTE_ORDER_MARK) :], len(_BYTE_ORDER_MARK)
        try:
            return data.decode("utf-8", errors="replace" if replace else "strict")
        except UnicodeDecodeError as error:
            rule = f"byte 0x{data[error.start]:02x} at byte offset {offset + error.start} ({error.reason})"
            raise RecordError("not_utf8", f"{place(record)} is not UTF-8: {rule}; {_UTF8_MEND}") from error
    try:
        data.encode("utf-8")
    except UnicodeEncodeError as error:
        if replace:
            return data.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        rule = f"half a surrogate pair at character {error.start}, which is not text"
        raise RecordError("not_utf8", f"{place(record)} holds {rule}; {_UTF8_MEND}") from error
    return data


def _json_object(line: str, record: Record) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter for brackets nested by the thousand
        rule = f"is not JSON ({error}); one JSON object per line is needed"
        raise RecordError("not_json", f"{place(record)} {rule}: mend it") from error
    if not isinstance(value, dict):
        rule = f"is a JSON {type(value).__name__}, not an object with fields"
        raise RecordError("wrong_type", f"{place(record)} {rule}; mend it")
    return value


def _field(fields: dict[str, Any], name: str, record: Record) -> Any:
    if name not in fields:
        rule = f"has no field {name!r} but {sorted(fields)[:20]}; choose another field (--text-field, --language-field)"
        raise RecordError("no_field", f"{place(record)} {rule}, or mend it")
    return fields[name]


def _nested(fields: Any, path: str, record: Record) -> Any:
    for name in path.split("."):
        fields = _field(fields if isinstance(fields, dict) else {}, name, record)
    return fields


def _unwanted(text: str, tag: Any, options: SourceOptions, record: Record) -> str | None:
    if options.languages:
        if not isinstance(tag, str):
            rule = f"{options.language_field!r} is {type(tag).__name__}, not a language's tag"
            raise RecordError("wrong_type", f"{place(record)}: {rule}; mend it")
        if tag not in options.languages:
            return "language"
    if not text.strip():
        return "empty"
    if len(text) < options.min_characters:
        return "too_short"
    return "too_long" if options.max_characters and len(text) > options.max_characters else None
