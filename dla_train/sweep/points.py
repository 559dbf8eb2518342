"""The runs of a sweep: a setting (values on the axes, or a baseline) with a seed is a point, and has a run directory.

A point is what its overrides say. Its folder holds `point.json` from before it first starts, so a sweep that is started
again finds its points, may bring new ones, and refuses to be another sweep.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dla_train.config import Config, ConfigError
from dla_train.config_rules import validate
from dla_train.durable import write_atomically
from dla_train.hydra_app import compose, config_to_yaml
from dla_train.run_process import quoted
from dla_train.sweep.definition import Scalar, SweepConfig, override_key, sweep_axes
from dla_train.sweep.sampling import Values, corners, draws, grid

POINTS_FOLDER, POINT_FILE = "points", "point.json"
CORNERS_CHECKED = 32
"""Corners of a search that are checked before it starts; what it asks for later is checked when it does."""
ILLEGAL_SHOWN = 20


@dataclass(frozen=True)
class Setting:
    """One choice of values, or a baseline; run once with every seed."""

    name: str
    """Made of its values, unique in the sweep."""
    values: Values
    """By axis; {} of a baseline."""
    overrides: tuple[str, ...]
    """What it sets beyond the overrides of the command line."""
    baseline: bool = False
    trial: int | None = None
    """Its number in Optuna's study."""


@dataclass(frozen=True)
class Point:
    """A run of the sweep."""

    name: str
    """Name of its folder."""
    setting: str
    values: Values
    baseline: bool
    trial: int | None
    seed: int
    overrides: tuple[str, ...]
    """The command line of its run, but for run_dir."""

    def folder(self, sweep_folder: Path) -> Path:
        """Its run directory."""
        return sweep_folder / POINTS_FOLDER / self.name


def baseline_settings(sweep: SweepConfig) -> list[Setting]:
    """The points to compare with."""
    return [Setting(safe_name(name), {}, tuple(words), baseline=True) for name, words in sweep.baselines.items()]


def swept_settings(sweep: SweepConfig) -> list[Setting]:
    """The settings of a grid or of random draws; those of tpe are asked for one by one."""
    axes = sweep_axes(sweep)
    if sweep.sampler == "grid":
        return [setting_of(sweep, values) for values in grid(axes)]
    return [setting_of(sweep, values) for values in draws(axes, sweep.budget, sweep.sampler_seed)]


def setting_of(sweep: SweepConfig, values: Values, trial: int | None = None) -> Setting:
    """A setting by its values."""
    leaves = [key.rsplit(".", 1)[-1] for key in values]
    short = leaves if len(set(leaves)) == len(leaves) else list(values)
    name = "-".join(f"{key}_{written(value)}" for key, value in zip(short, values.values(), strict=True))
    if trial is not None:
        name = f"trial_{trial:03d}-{name}"
    return Setting(
        safe_name(name), values, tuple(f"{key}={written(value)}" for key, value in values.items()), trial=trial
    )


def points_of(sweep: SweepConfig, overrides: Sequence[str], settings: Sequence[Setting]) -> list[Point]:
    """Every setting with every seed, seeds outside, so that comparisons are complete as early as they can be.

    Raises ConfigError where two settings have one name.
    """
    names = [setting.name for setting in settings]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two settings of the sweep are called {name}; rename one in sweep.baselines or axes")
    return [_point(sweep, overrides, setting, seed) for seed in sweep.seeds for setting in settings]


def check_points(sweep: SweepConfig, points: Sequence[Point]) -> dict[str, Config]:
    """The configuration of every point. Raises one ConfigError that lists all illegal points."""
    configs, wrong, composed = {}, [], dict[tuple[str, ...], Config]()
    for point in points:
        try:
            configs[point.name] = _point_config(sweep, point, composed)
        except ConfigError as error:
            wrong.append(f"  {point.name}: {error}")
    if wrong:
        more = [f"  and {len(wrong) - ILLEGAL_SHOWN} more"] if len(wrong) > ILLEGAL_SHOWN else []
        listed = "\n".join([*wrong[:ILLEGAL_SHOWN], *more])
        raise ConfigError(f"{len(wrong)} of {len(points)} points are illegal, so nothing is started:\n{listed}")
    return configs


def check_corners(sweep: SweepConfig, overrides: Sequence[str]) -> None:
    """Check a search where it can reach, at the ends of its axes. Raises ConfigError."""
    settings = [setting_of(sweep, values) for values in corners(sweep_axes(sweep), CORNERS_CHECKED)]
    check_points(sweep, [_point(sweep, overrides, setting, sweep.seeds[0]) for setting in settings])


def run_words(sweep: SweepConfig, point: Point) -> list[str]:
    """The settings of a point's run: its own, its folder, and what runs of a sweep have unless it says otherwise."""
    own = {"logging.progress": "false", "logging.wandb_group": quoted(sweep.name)}
    given = {override_key(word) for word in point.overrides}
    others = [f"{key}={value}" for key, value in own.items() if key not in given]
    return [*point.overrides, f"run_dir={quoted(str(point.folder(Path(sweep.folder))))}", *others]


def write_point(folder: Path, point: Point, config: Config) -> None:
    """Make a point's folder: what it is, and its configuration until its run writes its own."""
    run_dir = point.folder(folder)
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / POINT_FILE).is_file():
        write_atomically(run_dir / "config.yaml", config_to_yaml(config))
        write_atomically(run_dir / POINT_FILE, json.dumps(asdict(point), indent=1))


def point_from_dict(values: dict[str, Any]) -> Point:
    """A point of its plain values, as JSON holds them. Raises KeyError or TypeError."""
    return Point(**{**values, "overrides": tuple(values["overrides"])})


def read_points(folder: Path) -> list[Point]:
    """The points that lie in a sweep's folder, by name."""
    files = sorted((folder / POINTS_FOLDER).glob(f"*/{POINT_FILE}"))
    return [_read_point(path) for path in files]


def check_folder(folder: Path, points: Sequence[Point], *, grows: Callable[[Point], bool]) -> None:
    """Raise ConfigError if the folder holds points that this sweep does not have, or has with other settings.

    grows: tells points that the sweep finds while it runs, and that lie there rightly.
    """
    ours = {point.name: point for point in points}
    for there in read_points(folder):
        here = ours.get(there.name)
        if here is None and not grows(there):
            raise ConfigError(
                f"sweep.folder={folder} holds the point {there.name}, which is not one of this sweep; choose another "
                "folder, or start the sweep with the axes, baselines and seeds that it had (more are welcome)"
            )
        if here is not None and here.overrides != there.overrides:
            changed = sorted(set(here.overrides) ^ set(there.overrides))
            raise ConfigError(
                f"sweep.folder={folder} holds the point {there.name} with other settings: {', '.join(changed)}; choose "
                "another folder, or start the sweep with the settings that it had"
            )


def command_line(sweep_folder: Path, point: Point) -> str:
    """What reproduces a point in a folder of its own, as a user would type it."""
    run_dir = f"{sweep_folder}_again/{point.name}"
    return shlex.join(["dla-train", *point.overrides, f"run_dir={quoted(run_dir)}"])


def written(value: Scalar) -> str:
    """A value as Hydra reads it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def safe_name(name: str) -> str:
    """A name as a folder has it."""
    return re.sub(r"[^\w.-]+", "_", name)


def _point_config(sweep: SweepConfig, point: Point, composed: dict[tuple[str, ...], Config]) -> Config:
    """The checked configuration of a point; `composed` keeps those of other seeds, as composing takes 0.15 s."""
    shared = tuple(word for word in point.overrides if override_key(word) not in ("name", "seed"))
    if shared not in composed:
        composed[shared] = compose([*shared, "name=point", "run_dir=point"])
    config = copy.deepcopy(composed[shared])
    config.name, config.seed = _run_name(sweep, point.name), point.seed
    config.run_dir = str(point.folder(Path(sweep.folder)))
    validate(config, sweep.ranks)
    if not config.train.validation_batches:
        rule = f"leaves sweep.objective={sweep.objective} without a value"
        raise ConfigError(f"train.validation_batches=0 {rule}; set it")
    return config


def _run_name(sweep: SweepConfig, point_name: str) -> str:
    return f"{safe_name(sweep.name)}-{point_name}"


def _point(sweep: SweepConfig, overrides: Sequence[str], setting: Setting, seed: int) -> Point:
    own = setting.overrides if setting.baseline else (*sweep.settings, *overrides, *setting.overrides)
    base = overrides if setting.baseline else ()
    name = f"{setting.name}-seed_{seed}"
    words = [*base, *own, f"name={_run_name(sweep, name)}", f"seed={seed}"]
    last = {override_key(word): word for word in words}  # the later of two overrides of one setting
    return Point(name, setting.name, setting.values, setting.baseline, setting.trial, seed, tuple(last.values()))


def _read_point(path: Path) -> Point:
    try:
        return point_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete its folder, and the sweep runs it anew") from error
