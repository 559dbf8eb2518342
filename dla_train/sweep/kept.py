"""report.json: a sweep's results in one file, of which its pages can be made again without its runs.

`points` holds what every run left and is what is read back; `settings` holds what the tables say, worked out of them,
for other programs. One line a setting and a point, so that a change of one is a change of a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dla_train.config import ConfigError
from dla_train.durable import write_atomically
from dla_train.intervals import CONFIDENCE
from dla_train.sweep.definition import sweep_from_dict
from dla_train.sweep.outcomes import Outcome
from dla_train.sweep.point_results import COSTS, LOSSES, MERGE_STATISTICS, PointResult
from dla_train.sweep.points import point_from_dict
from dla_train.sweep.positions import span_difference, span_loss, span_words, spans_of
from dla_train.sweep.results import (
    SWEEP_FILE,
    Results,
    SettingResult,
    Spread,
    paired_difference,
    read_results,
    settings_of,
)

KEPT_FILE = "report.json"
_FORMAT = 1


def write_kept(results: Results, folder: Path) -> None:
    """Write report.json into `folder`."""
    head = {
        "format": _FORMAT,
        "folder": str(results.folder),
        "sweep": asdict(results.sweep),
        "overrides": results.overrides,
        "reference": results.reference.name if results.reference else None,
        "confidence": CONFIDENCE,
    }
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    parts.append(f'"settings": {_lines(_told(results, setting) for setting in results.ranked)}')
    parts.append(f'"points": {_lines(asdict(result) for result in results.points)}')
    write_atomically(folder / KEPT_FILE, "{\n" + ",\n".join(parts) + "\n}\n")


def is_kept(folder: Path) -> bool:
    """Whether a folder holds a kept report, and not the sweep itself."""
    return (folder / KEPT_FILE).is_file() and not (folder / SWEEP_FILE).is_file()


def open_results(folder: Path) -> Results:
    """Results of a sweep's folder, or else of a report.json kept in `folder`. Raises ConfigError where neither is."""
    path = folder / KEPT_FILE
    if not is_kept(folder):
        return read_results(folder)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != _FORMAT:
            raise ValueError(f"format {stored['format']!r:.20} where this program writes {_FORMAT}")
        sweep = sweep_from_dict(stored["sweep"])
        points = [_point_result(values) for values in stored["points"]]
        overrides = [str(word) for word in stored["overrides"]]
        return Results(Path(stored["folder"]), sweep, overrides, settings_of(points, sweep))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no report of a sweep ({error!r}); write it again: dla-sweep report") from error


def _point_result(values: dict[str, Any]) -> PointResult:
    outcome, curves = values["outcome"], values["curves"]
    return PointResult(
        point_from_dict(values["point"]),
        Outcome(**outcome) if outcome else None,
        str(values["state"]),
        int(values["step"]),
        {name: float(value) for name, value in values["numbers"].items()},
        {name: {int(step): float(value) for step, value in curve.items()} for name, curve in curves.items()},
        values["versions"],
    )


def _told(results: Results, setting: SettingResult) -> dict[str, Any]:
    """What the tables say of a ranked setting."""
    reference = results.reference if setting is not results.reference else None
    spans = {span_words(span): span for span in spans_of([setting])}
    told: dict[str, Any] = {"name": setting.name, "values": setting.values, "baseline": setting.baseline}
    told["objective"] = _plain(setting.spread)
    told["numbers"] = {name: _plain(setting.number(name)) for name in (*LOSSES, *MERGE_STATISTICS, *COSTS)}
    told["loss_by_position"] = {words: _plain(span_loss(setting, span)) for words, span in spans.items()}
    if reference:
        told["difference"] = _plain(paired_difference(setting.scores, reference.scores))
        told["difference_by_position"] = {
            words: _plain(span_difference(setting, reference, span)) for words, span in spans.items()
        }
    return told


def _plain(spread: Spread | None) -> dict[str, float | int | None] | None:
    if spread is None:
        return None
    ends = {"low": spread.interval.low, "high": spread.interval.high} if spread.interval else {}
    return {"mean": spread.mean, "deviation": spread.deviation, **ends, "seeds": spread.count}


def _lines(items: Iterable[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in items) + "\n]"
