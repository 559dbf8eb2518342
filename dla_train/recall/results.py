"""A study as one JSON file: settings, versions, every run of every seed. Page and pictures are made of it alone."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dla_train.checkpoint.checkpointer import own_version
from dla_train.config import ConfigError
from dla_train.durable import write_atomically
from dla_train.recall.arms import study_arms, study_tasks
from dla_train.recall.comparison import compare_arms
from dla_train.recall.runs import StudyRuns, as_result
from dla_train.recall.settings import StudyConfig

PRIVATE = ("output", "processes", "progress")
"""Settings that no number depends on."""


def write_results(study: StudyConfig, runs: StudyRuns, path: Path) -> None:
    """Write the file."""
    settings = {name: value for name, value in dataclasses.asdict(study).items() if name not in PRIVATE}
    arms = {}
    for numbers in compare_arms(study, runs):
        name = numbers.arm.name
        arms[name] = {
            "parameters": numbers.arm.parameters,
            "mlp_width": numbers.arm.config.model.mlp_width,
            "memory": dataclasses.asdict(numbers.arm.config.memory),
            **{key: value for key, value in dataclasses.asdict(numbers).items() if key != "arm"},
            "tuning": {f"{rate:g}": by_seed for rate, by_seed in runs.tuning.get(name, {}).items()},
            "runs": {seed: dataclasses.asdict(result) for seed, result in sorted(runs.results[name].items())},
        }
    versions = {"python": platform.python_version(), "torch": torch.__version__, "dla-train": own_version()}
    whole = {"study": settings, "versions": versions, "failures": runs.failures, "arms": arms}
    write_atomically(path, json.dumps(_plain(whole), indent=1) + "\n")


def read_results(path: Path) -> tuple[StudyConfig, StudyRuns]:
    """What `write_results` wrote. Raises ConfigError for a file that it did not."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        study = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudyConfig), whole["study"]))
        assert isinstance(study, StudyConfig)
        arms = whole["arms"]
        return study, StudyRuns(
            arms=[arm for arm in study_arms(study, study_tasks(study)) if arm.name in arms],
            rates={name: arm["learning_rate"] for name, arm in arms.items()},
            tuning={name: _tuning(arm["tuning"]) for name, arm in arms.items() if arm["tuning"]},
            results={name: {int(s): as_result(run) for s, run in arm["runs"].items()} for name, arm in arms.items()},
            failures=whole["failures"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} holds no results of dla-recall ({error!r}); give a file that it wrote") from error


def _tuning(found: dict[str, dict[str, float]]) -> dict[float, dict[int, float]]:
    return {float(rate): {int(seed): accuracy for seed, accuracy in by_seed.items()} for rate, by_seed in found.items()}


def _plain(value: Any) -> Any:
    """JSON has no nan: None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
