"""What a model has answered in a unit that is not finished: a line a request, so that a killed evaluation goes on.

The first line says what the answers belong to; a journal of other settings is an error. The last line of a process that
was killed may be torn, and is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dla_train.harness.errors import EvaluateError


class Journal:
    """Answers by a hash of the request's tokens."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Read what is there, or begin. Raises EvaluateError where it belongs to something else or is damaged."""
        self.path = path
        check_journal(path, identity)
        lines = _whole_lines(path)
        self.answers: dict[str, Any] = dict(_parsed(path, line, list) for line in lines[1:])
        if lines:
            os.truncate(path, sum(len(line) + 1 for line in lines))
        else:
            path.write_text(json.dumps({"identity": identity}, sort_keys=True) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self.answers)

    def get(self, key: str) -> Any:
        """The answer to a request, None where there is none."""
        return self.answers.get(key)

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keep some answers; they are on their way to the disk when this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            for key, answer in answers:
                self.answers[key] = answer
                file.write(json.dumps([key, answer]) + "\n")


class AnswersOfAnother:
    """What the journal of rank 0 holds, on another rank; what is added is kept by rank 0."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers

    def get(self, key: str) -> Any:
        """The answer to a request, None where there is none."""
        return self._answers.get(key)

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Know some answers from now on."""
        self._answers.update(answers)


def check_journal(path: Path, identity: dict[str, Any]) -> None:
    """Raises EvaluateError where a journal of other settings is."""
    lines = _whole_lines(path)
    if lines:
        check_identity(path, _parsed(path, lines[0], dict).get("identity"), identity)


def check_identity(path: Path, there: Any, here: dict[str, Any]) -> None:
    """Raises EvaluateError, naming what differs, where a file's settings are not these."""
    there = there if isinstance(there, dict) else {}
    other = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if other:
        told = "; ".join(f"{key} is {there.get(key)!s:.40} there and {here.get(key)!s:.40} here" for key in other)
        raise EvaluateError(f"{path} is of another evaluation: {told}. Choose another output=..., or move it away")


def _parsed(path: Path, line: bytes, kind: type) -> Any:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise EvaluateError(f"{path} is damaged ({error}); remove it, and its requests are asked again") from error
    if not isinstance(value, kind):
        raise EvaluateError(f"{path} is damaged ({line[:40]!r}); remove it, and its requests are asked again")
    return value


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, if there is one; what follows the last line break was cut off."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def request_key(kind: str, *parts: Any) -> str:
    """A hash of a request: its kind, its tokens and whatever else its answer depends on."""
    return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()[:32]
