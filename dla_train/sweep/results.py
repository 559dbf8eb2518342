"""What a sweep's folder holds, put together for a report: settings, their seeds, spread and paired differences.

A setting is ranked by the mean over all seeds of the sweep, so only one whose every seed has finished is ranked: a
mean over some of the seeds would compare different things.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dla_train.checkpoint.run_directory import METRICS_FILE
from dla_train.config import ConfigError
from dla_train.metrics import read_lines
from dla_train.sweep.definition import SweepConfig, sweep_from_dict
from dla_train.sweep.outcomes import Outcome, read_outcome
from dla_train.sweep.points import Point, read_points
from dla_train.sweep.sampling import Values

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Spread:
    """A mean with its spread over seeds."""

    mean: float
    deviation: float | None
    """Standard deviation of a sample; None of one value."""
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Of some values; None of none."""
        found = list(values)
        if not found:
            return None
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


@dataclass(frozen=True)
class PointResult:
    """A point with what its run left."""

    point: Point
    outcome: Outcome | None
    lines: list[dict[str, Any]]
    """Its metrics."""

    def last(self, name: str) -> float | None:
        """The last of a number in its metrics."""
        return next((float(line[name]) for line in reversed(self.lines) if name in line), None)


@dataclass(frozen=True)
class SettingResult:
    """A setting with its points, by seed."""

    name: str
    values: Values
    baseline: bool
    points: dict[int, PointResult]
    seeds: int
    """How many the sweep has."""

    @property
    def scores(self) -> dict[int, float]:
        """The objective by seed, of finished points."""
        return {
            seed: result.outcome.value
            for seed, result in self.points.items()
            if result.outcome and result.outcome.value is not None
        }

    @property
    def complete(self) -> bool:
        """Whether every seed has finished."""
        return len(self.scores) == self.seeds

    @property
    def spread(self) -> Spread | None:
        """Of the objective."""
        return Spread.of(self.scores.values())

    @property
    def mean(self) -> float:
        """Mean objective of a complete setting."""
        return statistics.fmean(self.scores.values())

    def number(self, name: str) -> Spread | None:
        """A number of the metrics' last lines, over the seeds; None where no run has it."""
        found = [result.last(name) for result in self.points.values()]
        return Spread.of(value for value in found if value is not None and math.isfinite(value))

    def curve(self, name: str) -> dict[int, float]:
        """A number by step, the mean over the seeds that have one there."""
        by_step: dict[int, list[float]] = {}
        for result in self.points.values():
            for line in result.lines:
                if name in line:
                    by_step.setdefault(int(line["step"]), []).append(float(line[name]))
        return {step: statistics.fmean(values) for step, values in sorted(by_step.items())}


@dataclass(frozen=True)
class Results:
    """A sweep's folder."""

    folder: Path
    sweep: SweepConfig
    overrides: list[str]
    settings: list[SettingResult]

    @property
    def ranked(self) -> list[SettingResult]:
        """Complete settings and baselines, the best first."""
        return sorted((setting for setting in self.settings if setting.complete), key=lambda setting: setting.mean)

    @property
    def swept(self) -> list[SettingResult]:
        """Ranked settings without the baselines."""
        return [setting for setting in self.ranked if not setting.baseline]

    @property
    def reference(self) -> SettingResult | None:
        """The baseline that differences are taken to: the first of the sweep."""
        first = next(iter(self.sweep.baselines), None)
        return next((item for item in self.settings if item.baseline and item.name == first), None)

    @property
    def points(self) -> list[PointResult]:
        """All points."""
        return [result for setting in self.settings for result in setting.points.values()]


def paired_difference(setting: SettingResult, reference: SettingResult) -> Spread | None:
    """Setting minus reference, seed by seed: what initialisation and data order do to both falls out."""
    theirs = reference.scores
    return Spread.of(value - theirs[seed] for seed, value in setting.scores.items() if seed in theirs)


def read_results(folder: Path) -> Results:
    """Read a sweep's folder, at any time. Raises ConfigError where it is none."""
    path = folder / SWEEP_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {SWEEP_FILE}; name the folder of a sweep")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        sweep, overrides = sweep_from_dict(stored["sweep"]), [str(word) for word in stored["overrides"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); start the sweep again, which writes it anew") from error
    by_setting: dict[str, dict[int, PointResult]] = {}
    for point in read_points(folder):
        run_dir = point.folder(folder)
        result = PointResult(point, read_outcome(run_dir), read_lines(run_dir / METRICS_FILE))
        by_setting.setdefault(point.setting, {})[point.seed] = result
    settings = [_setting(name, points, sweep) for name, points in by_setting.items()]
    return Results(folder, sweep, overrides, settings)


def _setting(name: str, points: Mapping[int, PointResult], sweep: SweepConfig) -> SettingResult:
    first = next(iter(points.values())).point
    return SettingResult(name, first.values, first.baseline, dict(sorted(points.items())), len(sweep.seeds))
