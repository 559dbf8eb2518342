"""Settings of a study: the schema that configs/recall.yaml and configs/study/*.yaml fill, and its rules.

A study is one recall task and the arms that are compared on it. What an arm is made of is checked by the rules of
every other run (config_rules.py); nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dla_train.config import ConfigError
from dla_train.config_sentences import explain
from dla_train.hydra_app import config_directory


@dataclass
class StudyConfig:
    """One comparison: a task, the arms, and how each is trained and judged."""

    name: str = MISSING
    """Label of the study."""
    output: str | None = None
    """Folder of its runs, tables and pictures; None is runs/recall/NAME. Runs that are finished there are kept."""
    task: dict[str, Any] = field(default_factory=dict)
    """Name and fields of the task (docs/recall.md)."""
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of the task by label, each some fields of it. Every step trains on one of them, and every one is judged.
    Empty is the task itself alone."""
    weights: dict[str, float] = field(default_factory=dict)
    """Odds of a part at a step, by label; one that is absent or 0 is judged without being trained on. Empty is equal
    odds for all."""
    easy: str | None = None
    """The part that an arm must have learnt for its other numbers to count; None lets every arm count."""
    easy_accuracy: float = 0.95
    """Share of right answers on the easy part that is asked for, of every seed."""
    goal_accuracy: float = 0.5
    """Accuracy on a part at which the steps to it are counted."""
    model: dict[str, Any] = field(default_factory=dict)
    """What all arms share of ModelConfig; backbone, vocabulary and name are filled in."""
    decay_rate: float | None = None
    """Decay rate (A) of every head at the start. None draws it from 1 to 16 as in pretraining, where some of many heads
    remember long; a single head would stand or fall with its draw."""
    step_size: float | None = None
    """Step size (dt) of every head at the start. None draws it from 0.001 to 0.1 as in pretraining, where Mamba-2 first
    writes so little that a small model does not learn to pair tokens in a few thousand steps."""
    attention: dict[str, Any] | None = None
    """ModelConfig fields of the softmax baseline beside those of `model`; None leaves it out."""
    backbones: list[str] = field(default_factory=lambda: ["mamba2", "gated_deltanet"])
    """Recurrent backbones; each gets every memory."""
    memories: dict[str, dict[str, Any]] = field(default_factory=dict)
    """MemoryConfig fields by label."""
    baseline: str = "single"
    """The memory that the others of its backbone are compared with."""
    match_parameters: bool = True
    """Widen the MLP of arms with fewer parameters until all have the largest's number, within 1%."""
    optim: dict[str, Any] = field(default_factory=dict)
    """OptimConfig fields; lr is learning_rates'."""
    steps: int = MISSING
    """Optimizer steps of a run."""
    batch_rows: int = 32
    """Rows of a step."""
    learning_rates: list[float] = field(default_factory=list)
    """Peak learning rates; with several, every arm takes the one best for it on average of tuning_seeds."""
    tuning_seeds: list[int] = field(default_factory=lambda: [1000])
    """Seeds of the runs that choose the learning rate; none of `seeds`. One chooses badly where seeds differ much."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rate by arm (`gated_deltanet_single`), where it was chosen before; such an arm is not tuned."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Seeds of the runs that are compared. A seed is the same initial weights and the same batches in every arm."""
    held_out_rows: int = 1024
    """Rows a trained arm is judged on, of each part; the same for all."""
    curve_interval_steps: int = 250
    """Steps between points of the learning curve, and so the resolution of steps to the goal."""
    curve_rows: int = 128
    """Rows behind a point of the learning curve, of each part."""
    processes: int = 0
    """Runs at work at once; 0 is one a processor core."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`; the processes share it."""
    progress: bool = True
    """Progress bar with ETA on standard error."""


AT_LEAST = {
    "batch_rows": 1,
    "curve_interval_steps": 1,
    "curve_rows": 1,
    "held_out_rows": 1,
    "processes": 0,
    "steps": 1,
}
"""Smallest legal value of counts."""


def compose(words: Sequence[str]) -> StudyConfig:
    """The checked settings of a command line such as `["study=paired_token", "seeds=[0]"]`. Raises ConfigError."""
    ConfigStore.instance().store(name="base_study", node=StudyConfig)
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_directory())):
            study = OmegaConf.to_object(hydra.compose("recall", list(words)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, _unknown, "dla-recall --help")) from error
    assert isinstance(study, StudyConfig)
    check(study)
    return study


def _unknown(key: str) -> str:
    names = [item.name for item in fields(StudyConfig)]
    near = difflib.get_close_matches(key, names, n=1)
    if "." in key and key.partition(".")[0] in names:
        return f"{key} is not in the study's file; write +{key}=VALUE to add it"
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{key} is not a setting of a study; {meant}choose from {', '.join(names)}"


def check(study: StudyConfig) -> None:
    """What can be checked without building the arms. Raises ConfigError at the first rule broken."""
    _check_numbers(study)
    _check_seeds_and_rates(study)
    _check_names(study)
    for key, group, own in (
        ("optim", study.optim, ("lr",)),
        ("model", study.model, ("name", "backbone", "vocab_size")),
    ):
        filled = [name for name in own if name in group]
        if filled:
            raise ConfigError(f"{key}.{filled[0]} is filled in by the study; leave it out")


def _check_numbers(study: StudyConfig) -> None:
    for key, least in AT_LEAST.items():
        if getattr(study, key) < least:
            raise ConfigError(f"{key}={getattr(study, key)} is below {least}; use {least} or more")
    for key in ("easy_accuracy", "goal_accuracy"):
        if not 0 < getattr(study, key) <= 1:
            raise ConfigError(f"{key}={getattr(study, key)} is no share of right answers; use one in (0, 1]")
    for key in ("decay_rate", "step_size"):
        value = getattr(study, key)
        if value is not None and value <= 0:
            raise ConfigError(f"{key}={value} must be above 0, or left out")


def _check_seeds_and_rates(study: StudyConfig) -> None:
    if not study.learning_rates or min(study.learning_rates) <= 0:
        raise ConfigError(f"learning_rates={study.learning_rates} must name at least one rate above 0")
    for arm, rate in study.rates.items():
        if rate <= 0:
            raise ConfigError(f"rates.{arm}={rate} must be above 0")
    for key in ("learning_rates", "seeds", "tuning_seeds", "backbones"):
        values = getattr(study, key)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{key}={values} must name at least one, and each once")
    for key in ("seeds", "tuning_seeds"):
        if min(getattr(study, key)) < 0:
            raise ConfigError(f"{key}={getattr(study, key)} has one below 0; use 0 or more")
    shared = sorted(set(study.tuning_seeds) & set(study.seeds))
    if shared:
        raise ConfigError(f"tuning_seeds={study.tuning_seeds} has {shared}, which are of seeds too; choose others")


def _check_names(study: StudyConfig) -> None:
    there = ", ".join(study.parts) or "there are none"
    if study.easy is not None and study.easy not in study.parts:
        raise ConfigError(f"easy={study.easy} is none of parts: {there}")
    unknown = [label for label in study.weights if label not in study.parts]
    if unknown:
        raise ConfigError(f"weights.{unknown[0]} is none of parts: {there}")
    if study.weights and (min(study.weights.values()) < 0 or not any(study.weights.values())):
        raise ConfigError(f"weights={study.weights} must be odds of at least 0, one of them above")
    if study.baseline not in study.memories:
        raise ConfigError(f"baseline={study.baseline} is none of memories: {', '.join(study.memories)}")
