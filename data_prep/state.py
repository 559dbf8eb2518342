"""What a killed preparation leaves for the next one: `PREFIX.unfinished.json`, from the start on and after every shard.

It says which settings and inputs the finished shards were made from, and where reading goes on. A restart with other
settings, or with inputs changed that have been read, is an error: its shards would not be one corpus.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.records import PrepareError
from dla_train.data.shard_list import Shard
from dla_train.durable import write_atomically

FORMAT_VERSION = 1


@dataclass
class State:
    """Everything that is finished."""

    settings: dict[str, Any]
    """What decides the bytes of the shards: tokenizer, options."""
    inputs: list[list[str | int]]
    """Identity of every source."""
    shards: int = 0
    """Finished shards: the next one's number."""
    source: int = 0
    """Source that reading goes on in."""
    record: int = 0
    """Last record of it that is in a finished shard."""
    progress: int = 0
    """Bytes or documents of the input that are done."""
    seconds: float = 0.0
    """Time spent on them."""
    counts: dict[str, int] = field(default_factory=dict)
    """Records by what became of them."""
    faults: list[str] = field(default_factory=list)
    """Messages of the first records that could not be used."""
    splits: dict[str, list[Shard]] = field(default_factory=dict)
    """The finished shards by split."""


def state_path(output: str) -> Path:
    """Where the state of an output is kept."""
    return Path(f"{output}.unfinished.json")


def write_state(output: str, state: State) -> None:
    """Write atomically, flushed to disk."""
    contents = {"format_version": FORMAT_VERSION, **dataclasses.asdict(state)}
    write_atomically(state_path(output), json.dumps(contents))


def read_state(output: str, settings: dict[str, Any], inputs: Sequence[list[str | int]]) -> State | None:
    """The state that is there, None if there is none worth keeping. Raises PrepareError if its shards are of other
    settings or inputs."""
    path = state_path(output)
    if not path.exists():
        return None
    anew = "finish it with them, choose another output, or begin anew with --overwrite"
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        version = contents.pop("format_version")
        contents["splits"] = {name: [Shard(**shard) for shard in shards] for name, shards in contents["splits"].items()}
        state = State(**contents)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise PrepareError(f"{path} is not a state of `dla-prepare` ({error}); begin anew with --overwrite") from error
    if version != FORMAT_VERSION:
        raise PrepareError(f"{path} has version {version}, not {FORMAT_VERSION}; begin anew with --overwrite")
    if state.shards == 0 and state.settings != settings:
        return None
    for name, value in settings.items():
        if state.settings.get(name) != value:
            was = f"{path} is an unfinished preparation with {name}={state.settings.get(name)!r}, now it is {value!r}"
            raise PrepareError(f"{was}; {anew}")
    read = state.source + (state.record > 0)
    for index, (before, now) in enumerate(zip(state.inputs[:read], inputs, strict=False)):
        if before != list(now):
            was = f"input {index} of {path}, which has been read, was {before} and is {list(now)}"
            raise PrepareError(f"{was}; {anew}")
    if len(inputs) < read:
        raise PrepareError(f"{path} has read {read} inputs, {len(inputs)} are given; {anew}")
    state.inputs = [list(entry) for entry in inputs]
    return state


@contextmanager
def locked(output: str) -> Iterator[None]:
    """Hold the output against a second preparation. Raises PrepareError if there is one."""
    path = Path(f"{output}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(stream.fileno()).st_ino == path.stat().st_ino  # not one that was removed meanwhile
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise PrepareError(f"{path} is held: another dla-prepare writes {output}; wait for it, or stop it")
        try:
            yield
        finally:
            path.unlink()
