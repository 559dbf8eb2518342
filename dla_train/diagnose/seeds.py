"""Comparisons of the same arms trained with other seeds, as one, whose intervals are over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dla_train.config import ConfigError
from dla_train.diagnose.comparison import Comparison, Quantity
from dla_train.diagnose.statistics import Means, means

NAME = "diagnostics.json"
SAME_OF_ARM = ("name", "model", "memory", "step", "trained_context_tokens")
SAME_OF_TEXT = ("fingerprint", "documents", "positions")


def read_seeds(folders: Sequence[str]) -> list[dict[str, Any]]:
    """What each comparison left in its folder. Raises ConfigError where they are not of the same arms and text."""
    reports = [_read(Path(folder) / NAME) for folder in folders]
    first = reports[0]
    for folder, report in zip(folders[1:], reports[1:], strict=True):
        for key, one, other in _facts_side_by_side(first, report):
            if one != other:
                raise ConfigError(
                    f"seeds: {key} is {other} in {folder} and {one} in {folders[0]}; compare the same arms on the same "
                    "text with each seed, only train.seed may differ"
                )
    trained = [report["arms"][0]["checkpoint_sha256"] for report in reports]
    if len(set(trained)) < len(trained):
        raise ConfigError(f"seeds={list(folders)} names the same checkpoint twice; give a comparison of each seed once")
    return reports


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return {key: report[key] for key in ("settings", "arms", "text", "bands", "curve", "lengths", "recalled")} | {
            "in_context": report["in_context"]
        }
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"seeds: {path} is no report of dla-diagnose ({error}); give the output of one") from error


def _facts_side_by_side(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = [("the number of arms", len(one["arms"]), len(other["arms"]))]
    for mine, theirs in zip(one["arms"], other["arms"], strict=False):
        found += [(f"{key} of the arm {mine['name']}", mine[key], theirs[key]) for key in SAME_OF_ARM]
    found += [(f"{key} of the text", one["text"][key], other["text"][key]) for key in SAME_OF_TEXT]
    for key in ("bands", "curve", "lengths", "recalled"):
        mine, theirs = ([_range(line) for line in report[key]] for report in (one, other))
        found.append((f"the ranges of {key}", mine, theirs))
    return found


def compare_seeds(reports: Sequence[dict[str, Any]], confidence: float) -> Comparison:
    """One comparison of several: every number is the mean over seeds of what was the mean over documents."""
    in_context = None
    if all(report["in_context"] is not None for report in reports):
        score = [report["in_context"] for report in reports]
        ranges = [tuple(score[0][key]) for key in ("early", "late")]
        in_context = _quantity([[line] for line in score], ranges, confidence)
    quantities = {}
    for key in ("bands", "curve", "lengths", "recalled"):
        ranges = [_range(line) for line in reports[0][key]]
        quantities[key] = _quantity([report[key] for report in reports], ranges, confidence)
    return Comparison(reference=reports[0]["arms"][0]["name"], in_context=in_context, **quantities)


def _quantity(of_seeds: Sequence[Sequence[Mapping[str, Any]]], ranges: Any, confidence: float) -> Quantity:
    def over_seeds(kind: str) -> dict[str, Means]:
        names = of_seeds[0][0][kind]
        return {name: means(_values(of_seeds, kind, name), confidence) for name in names}

    return Quantity(ranges, over_seeds("arms"), over_seeds("differences"))


def _values(of_seeds: Sequence[Sequence[Mapping[str, Any]]], kind: str, name: str) -> NDArray[np.float64]:
    """[seeds, n] float64; nan where a seed has nothing to say."""
    return np.array([[line[kind][name]["mean"] for line in lines] for lines in of_seeds], dtype=np.float64)


def _range(line: Mapping[str, Any]) -> tuple[int, int]:
    return line["first"], line["end"]
