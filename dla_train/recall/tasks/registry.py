"""Tasks by name: from the plain values of an experiment's file to a task, with every mistake named."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from dla_train.recall.tasks.errors import RecallError
from dla_train.recall.tasks.mqar import ForgettingMqar, Mqar
from dla_train.recall.tasks.needle import Needle
from dla_train.recall.tasks.noisy_recall import NoisyRecall
from dla_train.recall.tasks.paired_token import PairedToken
from dla_train.recall.tasks.selective_copying import SelectiveCopying
from dla_train.recall.tasks.sparse_mqar import SparseMqar
from dla_train.recall.tasks.task import RecallTask

_KINDS: dict[str, type[Any]] = {
    kind.name: kind for kind in (PairedToken, Mqar, SparseMqar, ForgettingMqar, NoisyRecall, SelectiveCopying, Needle)
}


def task_names() -> tuple[str, ...]:
    """What `name` may be."""
    return tuple(_KINDS)


def build_task(values: Mapping[str, Any]) -> RecallTask:
    """The task of `{"name": ..., field: value, ...}`; fields left out have their defaults. Raises RecallError."""
    if not isinstance(values, Mapping):
        raise RecallError(f"task={values!r} is not a mapping; give name: ... and the fields of that task")
    name = values.get("name")
    if not isinstance(name, str) or name not in _KINDS:
        raise RecallError(f"name={name!r} is not a recall task; {_nearest(str(name), _KINDS)}")
    kind = _KINDS[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given = {key: value for key, value in values.items() if key != "name"}
    for key, value in given.items():
        if key not in fields:
            raise RecallError(f"{name}: {key}={value!r} is not one of its fields; {_nearest(str(key), fields)}")
    for key, field in fields.items():
        if key not in given and field.default is dataclasses.MISSING:
            raise RecallError(f"{name}: {key} is not given and has no default; give {key}: ...")
    task: RecallTask = kind(**given)
    return task


def _nearest(word: str, legal: Iterable[str]) -> str:
    """What to write instead."""
    near = difflib.get_close_matches(word, list(legal), n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{meant}choose from {', '.join(legal)}"
