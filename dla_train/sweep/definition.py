"""What a sweep is: the schema of configs/sweep/*.yaml, read with the `sweep.key=value` words of the command line.

A sweep is about whole runs, so it is no part of a run's configuration: the words that are not its own are the run's
settings, and are checked point by point by the same rules as in `dla-train`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dla_train.config import ConfigError
from dla_train.config_sentences import GROUPS, setting_names, unknown_setting
from dla_train.hydra_app import config_directory
from dla_train.launch.settings import split

Scalar = bool | int | float | str | None


@dataclass
class SweepConfig:
    """A sweep."""

    name: str = MISSING
    """Label of the sweep; appears in its folder and report."""
    description: str = ""
    """What the sweep asks, in a sentence, for the report."""
    sampler: str = "grid"
    """`grid` (every combination), `random`, or `tpe` (Optuna)."""
    axes: dict[str, Any] = field(default_factory=dict)
    """By setting or group: a list of values, or `{low, high, log, integer}` for random and tpe."""
    settings: list[str] = field(default_factory=list)
    """Overrides of every swept point, but not of baselines; the command line's own come after them."""
    baselines: dict[str, list[str]] = field(default_factory=dict)
    """Points to compare with, by name: overrides instead of `settings` and axes. The first is what differences are
    taken to."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Every setting and baseline is run with each: the same initialisation and data order, so that differences are
    paired."""
    objective: str = "validation_loss"
    """`validation_loss` or `validation_bits_per_byte`, of the last validation; the smallest is best."""
    budget: int = 0
    """Settings that random and tpe draw; a grid takes all, so 0."""
    sampler_seed: int = 0
    """Seed of random and tpe."""
    prune: bool = False
    """tpe: stop settings whose validations lie above the median of earlier ones at that step."""
    prune_after_steps: int = 0
    """Steps of training before a setting may be stopped."""
    folder: str = "runs/sweeps/${name}"
    """Where the points' run directories, the study and the report lie; one sweep per folder."""
    parallel: int = 0
    """Points at a time; 0 is one per `ranks` devices, or cores where there is no device."""
    ranks: int = 1
    """Processes of a point; more than one are started by torchrun."""
    attempts: int = 2
    """Starts of a point that crashes, is killed or hangs, before it counts as failed."""
    retry_failed: bool = False
    """Start failed points again."""
    launcher: list[str] = field(default_factory=list)
    """The words `launcher=slurm launcher.key=value ...` of the command line; without, points run on this machine."""


CHOICES = {
    "sampler": ("grid", "random", "tpe"),
    "objective": ("validation_loss", "validation_bits_per_byte"),
}
OWNED = {
    "run_dir": "every point has a folder of its own; set sweep.folder",
    "name": "points are named by what is swept; set sweep.name",
    "seed": "set sweep.seeds",
    "checkpoint.resume": "points always resume",
    "train.stop_at_step": "points run to their end; set train.steps",
}
"""Settings of a run that the sweep itself gives, with the mend."""


@dataclass(frozen=True)
class Range:
    """An axis of numbers between two bounds, both included."""

    low: float
    high: float
    log: bool = False
    """Draw the logarithm evenly."""
    integer: bool = False
    """Whole numbers only; then the bounds are whole."""


Axis = Range | tuple[Scalar, ...]


def read_sweep(words: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """The sweep of a command line, checked, and the words that are settings of its runs. Raises ConfigError."""
    chosen = [word.removeprefix("sweep=") for word in words if word.startswith("sweep=")]
    if len(chosen) != 1:
        raise ConfigError(f"{len(chosen)} words sweep=...; name one of {', '.join(shipped())}, or a .yaml file")
    values = _read_yaml(chosen[0])
    values.setdefault("name", Path(chosen[0]).stem)
    for word in words:
        if word.startswith("sweep."):
            _set(values, word.removeprefix("sweep."))
    values["launcher"], words = split(words)
    sweep = sweep_from_dict(values)
    overrides = [word for word in words if not word.startswith(("sweep=", "sweep."))]
    check_sweep(sweep, overrides)
    return sweep, overrides


def sweep_from_dict(values: dict[str, Any]) -> SweepConfig:
    """The dataclass of plain values. Raises ConfigError on unknown keys and wrong types."""
    known = [item.name for item in fields(SweepConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean sweep.{near[0]}?" if near else f"choose from {', '.join(known)}"
            raise ConfigError(f"sweep.{key} is not a setting of a sweep; {advice}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SweepConfig), values)
        sweep = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"sweep.{error.full_key or error.key}: {reason}; give a value of its type") from error
    assert isinstance(sweep, SweepConfig)
    return sweep


def shipped() -> list[str]:
    """Names of the sweeps in configs/sweep."""
    return sorted(path.stem for path in (config_directory() / "sweep").glob("*.yaml"))


def check_sweep(sweep: SweepConfig, overrides: Sequence[str]) -> None:
    """Check the sweep itself; its points are checked in points.py. Raises ConfigError at the first rule broken."""
    for key, choices in CHOICES.items():
        value = getattr(sweep, key)
        if value not in choices:
            raise ConfigError(f"sweep.{key}={value} is not one of the choices; choose from {', '.join(choices)}")
    axes = sweep_axes(sweep)
    _check_counts(sweep)
    grid = sweep.sampler == "grid"
    for key, axis in axes.items():
        if grid and isinstance(axis, Range):
            raise ConfigError(f"sweep.axes.{key} is a range, and a grid needs values; list them, or use random or tpe")
    if grid and sweep.budget:
        raise ConfigError(f"sweep.budget={sweep.budget} is not used by sweep.sampler=grid; leave it at 0")
    if not grid and (not sweep.budget or not axes):
        raise ConfigError(f"sweep.sampler={sweep.sampler} needs axes and sweep.budget, the settings to draw; set both")
    if sweep.prune and sweep.sampler != "tpe":
        raise ConfigError(f"sweep.prune=true is not used by sweep.sampler={sweep.sampler}; use tpe, or leave it out")
    if sweep.prune_after_steps and not sweep.prune:
        raise ConfigError(f"sweep.prune_after_steps={sweep.prune_after_steps} needs sweep.prune=true; set both")
    if sweep.retry_failed and sweep.sampler == "tpe":
        raise ConfigError("sweep.retry_failed=true is not for tpe, which has drawn its conclusions; raise sweep.budget")
    if not axes and not sweep.baselines:
        raise ConfigError("sweep.axes and sweep.baselines are empty: there is nothing to run; name one")
    _check_overrides(sweep, axes, overrides)


def sweep_axes(sweep: SweepConfig) -> dict[str, Axis]:
    """The axes, typed, in their order. Raises ConfigError."""
    return {key: _axis(key, value) for key, value in sweep.axes.items()}


def override_key(word: str) -> str:
    """What an override is about: `memory.tau` of `memory.tau=0.3`."""
    return word.partition("=")[0].lstrip("+~")


def _read_yaml(chosen: str) -> dict[str, Any]:
    path = Path(chosen) if chosen.endswith((".yaml", ".yml")) else config_directory() / "sweep" / f"{chosen}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(chosen, shipped(), n=1, cutoff=0.5)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"sweep={chosen}: there is no {path}; {meant}choose from {', '.join(shipped())}, or a file")
    loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} is not a mapping of settings; see configs/sweep for examples")
    values = OmegaConf.to_container(loaded)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _set(values: dict[str, Any], word: str) -> None:
    """Apply `key=value`, `axes.SETTING=[...]` or `baselines.NAME=[...]`."""
    try:
        parsed = OverridesParser.create().parse_override(word)
        value: Any = parsed.value()
    except HydraException as error:
        raise ConfigError(
            f"sweep.{word}: {str(error).splitlines()[0]}; write sweep.key=value, and settings inside a value in "
            "quotes, as in sweep.baselines.frozen=['memory=dla_frozen'] (all of it in double quotes for the shell)"
        ) from error
    if parsed.is_sweep_override():
        raise ConfigError(f"sweep.{word} gives several values; write a list in brackets")
    key = str(parsed.key_or_group)
    group, _, entry = key.partition(".")
    if group in ("axes", "baselines") and entry:
        values[group] = {**(values.get(group) or {}), entry: value}
    else:
        values[key] = value


def _axis(key: str, value: Any) -> Axis:
    if isinstance(value, list) and value and all(isinstance(item, Scalar) for item in value):
        if len({str(item) for item in value}) < len(value):
            raise ConfigError(f"sweep.axes.{key}={value} names a value twice; give each once")
        return tuple(value)
    known = {item.name for item in fields(Range)}
    if isinstance(value, dict) and {"low", "high"} <= set(value) <= known:
        axis = Range(**value)
        numbers = all(isinstance(bound, int | float) and math.isfinite(bound) for bound in (axis.low, axis.high))
        whole = not axis.integer or (isinstance(axis.low, int) and isinstance(axis.high, int))
        if numbers and whole and axis.low < axis.high and (axis.low > 0 or not axis.log):
            return axis
        rule = "needs low < high, low above 0 where log is true, and whole bounds where integer is true"
        raise ConfigError(f"sweep.axes.{key}={value} {rule}; change the bounds")
    raise ConfigError(f"sweep.axes.{key}={value} is no axis; give a list of values or {{low, high, log, integer}}")


def _check_counts(sweep: SweepConfig) -> None:
    for key, least in (("budget", 0), ("prune_after_steps", 0), ("parallel", 0), ("ranks", 1), ("attempts", 1)):
        if getattr(sweep, key) < least:
            raise ConfigError(f"sweep.{key}={getattr(sweep, key)} is below {least}; use {least} or more")
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        raise ConfigError(f"sweep.seeds={sweep.seeds} must name at least one seed, and each once; e.g. [0,1,2]")
    if not sweep.name or not sweep.folder:
        raise ConfigError("sweep.name and sweep.folder must not be empty; give them a value")


def _check_overrides(sweep: SweepConfig, axes: dict[str, Axis], overrides: Sequence[str]) -> None:
    names = {*setting_names(), *GROUPS, "experiment"}
    for key in axes:
        if key not in names:
            raise ConfigError(f"sweep.axes: {unknown_setting(key)}")
    everywhere = [*overrides, *sweep.settings, *(word for words in sweep.baselines.values() for word in words)]
    for word in everywhere:
        if "=" not in word:
            raise ConfigError(f"{word} is not a setting; write key=value")
    for key in [*axes, *map(override_key, everywhere)]:
        if key in OWNED:
            raise ConfigError(f"{key} is given by the sweep: {OWNED[key]}")
    for word in [*overrides, *sweep.settings]:
        if override_key(word) in axes:
            raise ConfigError(f"{word} is swept over by sweep.axes.{override_key(word)}; leave one of them out")
