"""Local copies of the tasks' documents: DATA_DIR/TASK/SPLIT.jsonl, one JSON object a line, in the data set's own
columns.

They are read with `json` and handed to `datasets` as they are: its own reader guesses types, so that a column of dates
becomes timestamps. What is absent or not understood is an error that names the file, the line and the mend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from dla_train.harness.catalogue import TaskEntry
from dla_train.harness.errors import EvaluateError

HAYSTACK = Path("needles/haystack.txt")
"""Text of the needle tasks, in the folder of local copies."""


def local_files(data_dir: Path, entry: TaskEntry, num_fewshot: int) -> dict[str, Path]:
    """Files that an evaluation of the task reads, by split."""
    splits = [entry.split, entry.few_shot_split if num_fewshot else None]
    return {split: data_dir / entry.name / f"{split}.jsonl" for split in splits if split is not None}


def read_documents(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The documents of a local copy. Raises EvaluateError where it is absent, empty or not what the task reads."""
    documents = []
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                documents.append(_document(path, number, line, columns))
    if not documents:
        raise EvaluateError(f"{path} is empty; {_fetch(path)}")
    return documents


def check_first(path: Path, columns: Sequence[str]) -> None:
    """Look at a file's first line, so that most faults show before hours of work. Raises EvaluateError."""
    with _opened(path) as file:
        _document(path, 1, file.readline(), columns)


def file_hash(path: Path) -> str:
    """sha256 of a file. Raises EvaluateError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def read_haystack(path: Path) -> str:
    """The text that hides needles. Raises EvaluateError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise EvaluateError(
            f"the needle tasks hide needles in {path}, which cannot be read ({error.strerror}); name any long text "
            "with haystack=FILE, or fetch RULER's essays once: dla-evaluate fetch suite=ruler data_dir=..."
        ) from error
    except UnicodeDecodeError as error:
        raise EvaluateError(f"haystack={path} is not UTF-8 text ({error}); give a text file") from error


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with open(path, encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise EvaluateError(f"{path} is not UTF-8 text ({error}); {_fetch(path)}") from error


def _document(path: Path, number: int, line: str, columns: Sequence[str]) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise EvaluateError(f"{path}, line {number}, is not JSON ({error}); {_fetch(path)}") from error
    absent = [name for name in columns if not isinstance(document, dict) or name not in document]
    if absent:
        rule = f"lacks {', '.join(absent)}, which the task reads"
        raise EvaluateError(f"{path}, line {number}, {rule}; {_fetch(path)}")
    assert isinstance(document, dict)
    return document


def _unreadable(path: Path, error: OSError) -> EvaluateError:
    return EvaluateError(f"{path} cannot be read ({error.strerror}); {_fetch(path)}")


def _fetch(path: Path) -> str:
    folder = path.parent.parent
    return (
        f"write it where there is a network: dla-evaluate fetch suite=all tasks=[{path.parent.name}] data_dir={folder}"
    )
