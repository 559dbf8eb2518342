"""What a model has answered in a unit that is not finished: a line a request, so that a killed evaluation goes on.

The first line says what the answers belong to; a journal of other settings is begun anew. The last line of a process
that was killed may be torn, and is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Journal:
    """Answers by a hash of the request's tokens."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Read what is there; write the first line where nothing is, or what is belongs to something else."""
        self.path = path
        head = json.dumps({"identity": identity}, sort_keys=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        self._answers: dict[str, Any] = {}
        if lines[:1] == [head]:
            whole = lines[1:-1]  # what follows the last line break was cut off
            self._answers = {key: answer for key, answer in map(json.loads, whole)}
            path.write_text("\n".join([head, *whole, ""]), encoding="utf-8")
        else:
            path.write_text(head + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Any:
        """The answer to a request, None where there is none."""
        return self._answers.get(key)

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keep some answers; they are on their way to the disk when this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            for key, answer in answers:
                self._answers[key] = answer
                file.write(json.dumps([key, answer]) + "\n")


def request_key(kind: str, *parts: Any) -> str:
    """A hash of a request: its kind, its tokens and whatever else its answer depends on."""
    return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()[:32]
