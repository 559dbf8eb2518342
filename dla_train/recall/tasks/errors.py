"""The error of recall tasks, and the checks every task makes of its own fields."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn


class RecallError(ValueError):
    """A setting that cannot be used: names the field, its value, the rule and the mend."""


def reject(task: Any, field: str, rule: str, mend: str) -> NoReturn:
    """Raise RecallError about one field of a task's dataclass."""
    raise RecallError(f"{task.name}: {field}={getattr(task, field)!r} {rule}; {mend}")


def check_fields(task: Any, at_least: Mapping[str, int], choices: Mapping[str, Sequence[str]] | None = None) -> None:
    """Types of all fields of a task's dataclass, lower bounds of its numbers and choices of its strings.

    A float may be given as an integer; a bool is no number. Raises RecallError.
    """
    types = typing.get_type_hints(type(task))
    for field in dataclasses.fields(task):
        kind, value = types[field.name], getattr(task, field.name)
        accepted = (int, float) if kind is float else (kind,)
        if kind in (int, float, bool, str) and type(value) not in accepted:
            reject(task, field.name, f"is not of type {kind.__name__}", "give a value of that type")
    for name, bound in at_least.items():
        if getattr(task, name) < bound:
            reject(task, name, f"is less than {bound}", f"give {bound} or more")
    for name, legal in (choices or {}).items():
        if getattr(task, name) not in legal:
            reject(task, name, "is not one of the choices", f"choose from {', '.join(legal)}")
