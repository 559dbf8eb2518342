"""A run's position in its data, as a checkpoint holds it, and what may change before the run goes on.

The cursor counts tokens, and says what decided the order so far: the constants of the run, the phases that lie in the
past, and for every source its files' fingerprint and how far it was read. Sources go on from the rows they had, so
later phases may be changed or added at will. What contradicts the past is an error that names it, unless
data.allow_changed says that it is meant; then it is logged, and written into every later cursor.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from dla_train.data.blend import Blend
from dla_train.data.errors import DataError
from dla_train.data.row_source import Position, RowSource

logger = logging.getLogger(__name__)

DataState = dict[str, Any]
"""Cursor as plain values for JSON."""
CONSTANTS = ("context_tokens", "global_batch_rows", "seed", "packing")
"""What no run may change: rows and their order are counted in it."""


def differences(state: DataState, constants: dict[str, Any], blend: Blend, sources: dict[str, RowSource]) -> list[str]:
    """Sentences about what contradicts the past of `state`, other than the constants. Raises DataError for those."""
    if "timeline" not in state:
        raise DataError("the checkpoint's data cursor is of an earlier version; start a new run from its weights")
    for key in CONSTANTS:
        if state.get(key) != constants[key]:
            raise DataError(
                f"the checkpoint was trained on data with {key}={state.get(key)}, this run has {constants[key]}; "
                "resume with the same one, or start a new run"
            )
    step = state["tokens"] // (constants["context_tokens"] * constants["global_batch_rows"])
    found = _changed_phases(state["timeline"], blend.timeline(step), blend.rows_per_step)
    for name, stored in state["sources"].items():
        if name in sources and stored["rows"] and stored["files"] != sources[name].files.fingerprint:
            found.append(
                f"source {name} was read from files={stored['files'][:12]}, {', '.join(sources[name].files.prefixes)} "
                f"has {sources[name].files.fingerprint[:12]}"
            )
    return found


def source_state(source: RowSource, rows: int) -> dict[str, Any]:
    """The entry of one source that `rows` rows were read of."""
    tokens = rows * source.context_tokens
    return {"files": source.files.fingerprint, "tokens": tokens, **asdict(source.position(rows))}


def restored_position(source: RowSource, stored: dict[str, Any]) -> Position:
    """Where a source goes on: where it stood, or, of files that changed, with the next epoch."""
    if stored["rows"] and stored["files"] != source.files.fingerprint:
        return Position(stored["rows"], stored["epoch"] + 1, 0)
    return Position(stored["rows"], stored["epoch"], stored["row"])


def _changed_phases(there: list[Any], here: list[Any], rows_per_step: int) -> list[str]:
    for index in range(max(len(there), len(here))):
        old, new = (phases[index] if index < len(phases) else None for phases in (there, here))
        if old != new:
            return [f"past phase {index} was {_described(old)}, now it is {_described(new)}"]
    return []


def _described(phase: dict[str, Any] | None) -> str:
    if phase is None:
        return "not there"
    weights = ", ".join(f"{name} {weight}" for name, weight in phase["weights"].items())
    return f"from step {phase['start_step']} with weights {weights} and context_tokens={phase['context_tokens']}"
