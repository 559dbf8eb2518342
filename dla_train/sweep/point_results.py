"""What a point's run left, reduced to what a report tells of it: last numbers, thinned curves, size, versions.

A report is always made of these, and a kept report.json holds them whole, so both ways give the same pages.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dla_train.checkpoint.errors import CheckpointError
from dla_train.checkpoint.run_directory import CONFIG_FILE
from dla_train.checkpoint.stored import open_step
from dla_train.config import ConfigError
from dla_train.hydra_app import config_from_dict
from dla_train.models.cost import cache_bytes, parameter_count
from dla_train.runs import read_run
from dla_train.sweep.outcomes import Outcome, read_outcome
from dla_train.sweep.points import Point
from dla_train.trackers import METRICS_FILE, read_lines

CURVE_POINTS = 128
"""Most points of a kept curve: a picture shows no more."""
MERGE_STATISTICS = ("boundary_rate", "live_slots", "tau")
LOSSES = ("validation_loss", "validation_bits_per_byte", "loss")
COSTS = ("parameters", "tokens_per_second", "memory_bytes", "cache_bytes")


@dataclass(frozen=True)
class PointResult:
    """A point with what its run left."""

    point: Point
    outcome: Outcome | None
    state: str
    """`finished`, `failed` or `pruned`; without an outcome that of its run, as `dla-runs` says it."""
    step: int
    """Optimizer steps of its newest line, or of its outcome."""
    numbers: dict[str, float]
    """The last finite value of every number of its metrics, but the median of `tokens_per_second` and the largest
    `memory_bytes`; and `parameters` and `cache_bytes`, by formula."""
    curves: dict[str, dict[int, float]]
    """Some numbers by step, at most CURVE_POINTS of each, in six digits."""
    versions: dict[str, str]
    """Of the programs that wrote its newest checkpoint; {} without one."""


def read_point_result(point: Point, run_dir: Path, size: dict[str, float]) -> PointResult:
    """What lies in a point's folder, at any time; `size` is its setting's `model_size`."""
    outcome, lines = read_outcome(run_dir), read_lines(run_dir / METRICS_FILE)
    by_name: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                by_name.setdefault(name, {})[int(line["step"])] = float(value)
    numbers = {name: list(values.values())[-1] for name, values in by_name.items()}
    if speeds := by_name.get("tokens_per_second"):
        numbers["tokens_per_second"] = statistics.median(speeds.values())
    if peaks := by_name.get("memory_bytes"):  # a start after a stop counts from nothing
        numbers["memory_bytes"] = max(peaks.values())
    curves = {name: _thinned(by_name[name]) for name in (*LOSSES, *MERGE_STATISTICS) if name in by_name}
    newest = int(lines[-1]["step"]) if lines else 0
    state, step = (outcome.state, outcome.step) if outcome else (read_run(run_dir).state, newest)
    return PointResult(point, outcome, state, step, numbers | size, curves, _versions(run_dir))


def model_size(run_dir: Path) -> dict[str, float]:
    """`parameters`, and `cache_bytes` of decoding one sequence of data.context_tokens tokens, by config.yaml.

    {} where there is none, or one whose settings this version of the program does not know.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        loaded: Any = OmegaConf.to_container(OmegaConf.load(path))
        config = config_from_dict(loaded)
    except (ConfigError, OmegaConfBaseException, YAMLError):
        return {}
    tokens, element = config.data.context_tokens, 2 if config.train.dtype == "bfloat16" else 4
    cache = cache_bytes(config.model, config.memory, 1, tokens, compute_bytes=element)
    return {"parameters": float(parameter_count(config.model, config.memory)), "cache_bytes": float(cache)}


def _thinned(curve: dict[int, float]) -> dict[int, float]:
    """Every so many steps, counted from the last, which stays."""
    stride = -(-len(curve) // CURVE_POINTS)
    kept = list(curve.items())[::-1][::stride][::-1]
    return {step: float(f"{value:.6g}") for step, value in kept}


def _versions(run_dir: Path) -> dict[str, str]:
    try:
        checkpoint, _ = open_step(run_dir)
        return {name: str(version) for name, version in checkpoint.trainer()["versions"].items()}
    except CheckpointError:  # none yet, or none that can be read: a report has nothing to say about it
        return {}
