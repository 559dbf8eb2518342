"""What a sweep's folder holds, put together for a report: settings, their seeds, spread and paired differences.

A setting is ranked by the mean over all seeds of the sweep, so only one whose every seed has finished is ranked: a
mean over some of the seeds would compare different things.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dla_train.config import ConfigError
from dla_train.intervals import Interval, interval
from dla_train.sweep.definition import SweepConfig, sweep_from_dict
from dla_train.sweep.point_results import PointResult, model_size, read_point_result
from dla_train.sweep.points import read_points, safe_name
from dla_train.sweep.sampling import Values

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Spread:
    """A mean with its spread over seeds."""

    mean: float
    deviation: float | None
    """Standard deviation of a sample; None of one value."""
    count: int
    interval: Interval | None
    """Student's t, at intervals.CONFIDENCE; None of one value."""

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Of some values; None of none."""
        found = list(values)
        if not found:
            return None
        if len(found) == 1:
            return cls(found[0], None, 1, None)
        return cls(statistics.fmean(found), statistics.stdev(found), len(found), interval(found))


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

    def by_seed(self, name: str) -> dict[int, float]:
        """A number of the finished runs that have it, by seed."""
        finished = {seed: self.points[seed].numbers for seed in self.scores}
        return {seed: numbers[name] for seed, numbers in finished.items() if name in numbers}

    def number(self, name: str) -> Spread | None:
        """The same over the seeds; None where no finished run has it."""
        return Spread.of(self.by_seed(name).values())

    def curve(self, name: str) -> dict[int, float]:
        """A number by step, the mean over the seeds that have one there."""
        by_step: dict[int, list[float]] = {}
        for result in self.points.values():
            for step, value in result.curves.get(name, {}).items():
                by_step.setdefault(step, []).append(value)
        return {step: statistics.fmean(values) for step, values in sorted(by_step.items())}


@dataclass(frozen=True)
class Results:
    """A sweep's folder."""

    folder: Path
    """Where its runs are, or were when a report was kept."""
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
        first = safe_name(next(iter(self.sweep.baselines), ""))
        return next((item for item in self.settings if item.baseline and item.name == first), None)

    def label(self, setting: SettingResult) -> str:
        """A setting's name, marked as a baseline where there are axes beside it."""
        return setting.name + (" (baseline)" if setting.baseline and self.sweep.axes else "")

    @property
    def points(self) -> list[PointResult]:
        """All points."""
        return [result for setting in self.settings for result in setting.points.values()]


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Spread | None:
    """Ours minus theirs, seed by seed: what initialisation and data order do to both falls out."""
    return Spread.of(value - theirs[seed] for seed, value in ours.items() if seed in theirs)


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
    sizes: dict[str, dict[str, float]] = {}  # by setting: seeds do not differ in it, and it takes a while
    results = []
    for point in read_points(folder):
        run_dir = point.folder(folder)
        if point.setting not in sizes:
            sizes[point.setting] = model_size(run_dir)
        results.append(read_point_result(point, run_dir, sizes[point.setting]))
    return Results(folder, sweep, overrides, settings_of(results, sweep))


def settings_of(results: Iterable[PointResult], sweep: SweepConfig) -> list[SettingResult]:
    """Points put together by setting."""
    by_setting: dict[str, dict[int, PointResult]] = {}
    for result in results:
        by_setting.setdefault(result.point.setting, {})[result.point.seed] = result
    return [_setting(name, points, sweep) for name, points in by_setting.items()]


def _setting(name: str, points: Mapping[int, PointResult], sweep: SweepConfig) -> SettingResult:
    first = next(iter(points.values())).point
    return SettingResult(name, first.values, first.baseline, dict(sorted(points.items())), len(sweep.seeds))
