"""The tasks of catalogue.yaml: what is known of each before lm_eval is imported."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import yaml

from dla_train.config import ConfigError


@dataclass(frozen=True)
class TaskEntry:
    """One task."""

    name: str
    """lm_eval's name."""
    label: str
    """Heading of its column."""
    metric: str
    """The metric of the published tables, by lm_eval's name."""
    file: str
    """Its definition, in lm_eval's folder of tasks."""
    needles: bool = False
    """Generated here (needles.py), at given lengths, instead of read."""
    hub: str | None = None
    """Data set on the Hugging Face hub."""
    subset: str | None = None
    """Its configuration."""
    split: str | None = None
    """What is evaluated."""
    few_shot_split: str | None = None
    """Where solved examples come from; None has none."""
    columns: tuple[str, ...] = ()
    """Keys that every document needs."""

    @property
    def percent(self) -> bool:
        """Whether tables show the metric times 100."""
        return "perplexity" not in self.metric


@functools.cache
def catalogue() -> dict[str, TaskEntry]:
    """Every task by name."""
    values = yaml.safe_load(Path(__file__).with_name("catalogue.yaml").read_text(encoding="utf-8"))
    return {
        name: TaskEntry(name=name, **{**entry, "columns": tuple(entry.get("columns", ()))})
        for name, entry in values.items()
    }


def task_entry(name: str) -> TaskEntry:
    """The task of that name. Raises ConfigError."""
    if name not in catalogue():
        raise ConfigError(f"{name} is not a task that is known here; choose from {', '.join(sorted(catalogue()))}")
    return catalogue()[name]
