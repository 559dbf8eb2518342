"""One run per directory: what a run is, and whether a directory holds this one.

A run is its model, memory, data, optimizer, seed, initial weights, global batch, length, segments and compute type:
whatever decides its numbers beyond rounding. Free to change between starts are the ranks, engine, micro-batch,
recomputation, device, chunk length and backend of the operations, stop_at_step, and how it validates, evaluates, logs
and saves.
`train.steps` is part of the run: the schedules end there, so a longer run is another run from its first step on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dla_train.checkpoint.errors import CheckpointError, RunDirectoryError
from dla_train.checkpoint.manifest import parse_json, read_small
from dla_train.checkpoint.run_lock import RunLock
from dla_train.config import Config
from dla_train.durable import write_atomically
from dla_train.trackers import METRICS_FILE

if TYPE_CHECKING:
    from dla_train.parallel.mesh import Mesh

RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"
_FREE = {"model": ("name",), "memory": ("backend", "chunk_tokens")}
_SHOWN = 5
_FIRST = ("model.backbone", "memory.policy")


def run_identity(config: Config, data_fingerprint: str, tokenizer_fingerprint: str) -> dict[str, Any]:
    """Every setting that makes two runs different, by dotted key."""
    identity: dict[str, Any] = {"seed": config.seed, **_settings(config, "model", "memory", "optim")}
    for key in ("steps", "global_batch_rows", "segment_tokens", "dtype", "initial"):
        identity[f"train.{key}"] = getattr(config.train, key)
    identity["data.context_tokens"], identity["data.packing"] = config.data.context_tokens, config.data.packing
    identity["data fingerprint"] = data_fingerprint
    identity["tokenizer fingerprint"] = tokenizer_fingerprint
    return identity


def check_model_settings(folder: Path, stored: dict[str, Any], config: Config) -> None:
    """Raise CheckpointError unless a checkpoint's configuration has the run's model and memory.

    Shapes do not tell: policies and rules of a memory that merge differently may have the same parameters.
    """
    here = _settings(config, "model", "memory")
    there = {key: _default(key) for key in here}
    for key in here:
        group, _, name = key.partition(".")
        values = stored.get(group)
        if isinstance(values, dict) and name in values:
            there[key] = values[name]
    if listed := _listed(there, here):
        raise CheckpointError(
            f"{folder} was trained with another model or memory: {listed}. Resume with its settings, or begin a new "
            "run with its weights: dla-export, then train.initial=FOLDER in another run_dir"
        )


def check_run_directory(config: Config, identity: dict[str, Any], mesh: Mesh) -> None:
    """Raise RunDirectoryError, on every rank, unless run_dir is free or holds this very run. Writes nothing."""
    if message := mesh.on_writer(lambda: find_objection(config, identity)):
        raise RunDirectoryError(message)


@contextmanager
def hold_run_directory(config: Config, identity: dict[str, Any], mesh: Mesh) -> Iterator[RunLock | None]:
    """Check run_dir and keep every other process from training in it; gives rank 0 the lock. Collective.

    Raises RunDirectoryError on every rank. Makes the folder, and writes nothing but the lock.
    """
    check_run_directory(config, identity, mesh)
    lock, objection = _take_lock(Path(config.run_dir)) if mesh.is_writer else (None, None)
    try:
        if message := mesh.from_writer(objection):
            raise RunDirectoryError(message)
        check_run_directory(config, identity, mesh)  # another process may have begun a run here in between
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _take_lock(run_dir: Path) -> tuple[RunLock | None, str | None]:
    """(the lock, None) or (None, why there is none)."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return RunLock(run_dir), None
    except RunDirectoryError as error:
        return None, str(error)
    except OSError as error:
        return None, f"run_dir={run_dir} cannot be written: {error}; give this user the right to, or choose another"


def write_run_files(config: Config, config_yaml: str, identity: dict[str, Any], mesh: Mesh) -> None:
    """Mark run_dir as holding this run and write the configuration of this start."""
    if mesh.is_writer:
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / RUN_FILE, json.dumps({"name": config.name, "identity": identity}, indent=1))
        write_atomically(run_dir / CONFIG_FILE, config_yaml)
    mesh.barrier()


def find_objection(config: Config, identity: dict[str, Any]) -> str | None:
    """Why run_dir cannot take the run, by its files alone; None where it can."""
    run_dir, resume = Path(config.run_dir), config.checkpoint.resume
    if run_dir.exists() and not run_dir.is_dir():
        return f"run_dir={run_dir} is a file; choose another run_dir"
    if not (run_dir / RUN_FILE).is_file():
        left = [name for name in (METRICS_FILE, "checkpoints") if (run_dir / name).exists()]
        if left:
            return f"run_dir={run_dir} holds {' and '.join(left)} but no {RUN_FILE}; choose another run_dir"
        if resume == "required":
            return f"checkpoint.resume=required, but run_dir={run_dir} holds no run; check the path, or set it to auto"
        return None
    if resume == "never":
        return f"run_dir={run_dir} holds a run and checkpoint.resume=never; choose another run_dir, or set it to auto"
    try:
        stored = parse_json(run_dir / RUN_FILE, read_small(run_dir / RUN_FILE))
    except CheckpointError as error:
        return f"{error}; put the file back from a copy, or choose another run_dir"
    if not isinstance(stored.get("identity"), dict):
        return (
            f"{run_dir / RUN_FILE} does not say which run this is; put it back from a copy, or choose another run_dir"
        )
    return _differences(run_dir, stored, identity)


def _differences(run_dir: Path, stored: dict[str, Any], identity: dict[str, Any]) -> str | None:
    unnamed = identity.keys() - stored["identity"].keys()
    there = _settings_of_last_start(run_dir, unnamed) | stored["identity"]
    listed = _listed(there, identity)
    if not listed:
        return None
    return (
        f"run_dir={run_dir} holds another run, {stored.get('name')}: {listed}. "
        "Choose another run_dir, or resume with the settings of that run"
    )


def _settings_of_last_start(run_dir: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Settings that an earlier version did not write into the identity, by config.yaml.

    What is not there either was not there to be chosen: it is what it is by default.
    """
    try:
        config = OmegaConf.load(run_dir / CONFIG_FILE)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        config = OmegaConf.create()
    if not isinstance(config, DictConfig):
        config = OmegaConf.create()
    return {key: OmegaConf.select(config, key, default=_default(key)) for key in keys}


def _settings(config: Config, *groups: str) -> dict[str, Any]:
    """What of some groups decides a run, by dotted key."""
    return {
        f"{group}.{key}": value
        for group in groups
        for key, value in dataclasses.asdict(getattr(config, group)).items()
        if key not in _FREE.get(group, ())
    }


def _listed(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The first settings that differ, those that explain the others before them; "" for none."""
    differing = [key for key in there.keys() | here.keys() if there.get(key) != here.get(key)]
    keys = sorted(differing, key=lambda key: (key not in _FIRST, key.endswith("fingerprint"), key))
    shown = [f"{key} is {_short(there.get(key))} there and {_short(here.get(key))} here" for key in keys[:_SHOWN]]
    return "; ".join(shown) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def _default(key: str) -> Any:
    """The default of a dotted setting; None for one that has none."""
    group, _, name = key.partition(".")
    kinds = {field.name: field.default_factory for field in dataclasses.fields(Config)}
    kind = kinds.get(group)
    if not dataclasses.is_dataclass(kind):
        return None
    return next((f.default for f in dataclasses.fields(kind) if f.name == name and f.default != MISSING), None)


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "..." if len(text) > 40 else text
