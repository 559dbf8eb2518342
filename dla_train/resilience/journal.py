"""Returns to a checkpoint and the data they passed over, in `<run_dir>/journal.jsonl`, which every later start replays.

Optimizer step s trains on data step `data_step(s)`: s itself, moved on past every range of data steps that a rewind
left out. It is a function of the journal and s alone, so that a run that is resumed, at whatever step, reads what an
uninterrupted one would.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dla_train.durable import write_atomically

JOURNAL_FILE = "journal.jsonl"


class JournalError(ValueError):
    """journal.jsonl cannot be read: going on without it would train on other data than before."""


@dataclass(frozen=True)
class Rewind:
    """One return to a checkpoint."""

    at_step: int
    """Optimizer step after which it was decided."""
    to_step: int
    """Step of the checkpoint that was loaded."""
    from_data_step: int
    """First data step that is passed over."""
    until_data_step: int
    """First data step after those that are passed over."""
    reason: str


def data_step(step: int, rewinds: Sequence[Rewind]) -> int:
    """The data step of optimizer step `step` (both count from 0)."""
    position, passed = step, 0
    for rewind in sorted(rewinds, key=lambda rewind: rewind.from_data_step):
        begin = max(rewind.from_data_step, passed)  # ranges may overlap: a later rewind may reach further back
        if begin < rewind.until_data_step and position >= begin:
            position += rewind.until_data_step - begin
            passed = rewind.until_data_step
    return position


def data_position(done: int, rewinds: Sequence[Rewind]) -> int:
    """Where the data stands after `done` steps: one past the last data step that was read, whatever comes next.

    So the cursor of a checkpoint stays true when a later rewind goes back to it.
    """
    return data_step(done - 1, rewinds) + 1 if done else 0


def read_journal(run_dir: Path) -> list[Rewind]:
    """The rewinds of a run, in order. Raises JournalError where a line is no entry."""
    path = run_dir / JOURNAL_FILE
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        entry = _entry(line)
        if entry is None:
            mend = "restore the file, or choose another run_dir"
            raise JournalError(f"{path}:{number} is not an entry of this version; {mend}")
        found.append(entry)
    return found


def append_to_journal(run_dir: Path, rewind: Rewind) -> None:
    """Write a rewind down, on the disk when this returns; it is obeyed from then on."""
    lines = [json.dumps(dataclasses.asdict(entry)) + "\n" for entry in [*read_journal(run_dir), rewind]]
    write_atomically(run_dir / JOURNAL_FILE, "".join(lines))


def _entry(line: str) -> Rewind | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    kinds = {field.name: {"int": int, "str": str}[str(field.type)] for field in dataclasses.fields(Rewind)}
    if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != kinds:
        return None
    return Rewind(**values)
