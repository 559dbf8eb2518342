"""What data.train and data.phases say: sources and phases, checked, with one form for every way to write them.

`data.train` is a list of prefixes (one source, called `train`) or of sources, each a name, its prefixes and a weight.
`data.phases` gives weights and a context from a token on; without it there is one phase of the sources' own weights.
Nothing here opens a file. Every mistake is a ConfigError that names the key, the rule and the mend.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dla_train.config import Config, ConfigError, DataConfig, PhaseConfig
from dla_train.layout_rules import ranks_along_time, refuse, time_problem

PLAIN_SOURCE = "train"
"""Name of the one source that a list of prefixes is."""
_NAME = re.compile(r"[\w.-]+")
_SOURCE_KEYS = ("name", "prefixes", "weight")


@dataclass(frozen=True)
class SourceSettings:
    """One entry of data.train."""

    name: str
    prefixes: tuple[str, ...]
    weight: Fraction | None
    """None where the phases give the weights."""
    whole_batches: bool
    """A plain list ends its epoch with the last whole global batch; a named source reads all its rows."""


@dataclass(frozen=True)
class PhaseSettings:
    """One phase: weights of the sources that have rows in it, by name."""

    start_tokens: int
    weights: dict[str, Fraction]
    context_tokens: int


def training_sources(data: DataConfig) -> list[SourceSettings]:
    """The sources of `data.train`. Raises ConfigError."""
    if not data.train:
        raise ConfigError(f"data.train={data.train} names no files; give at least one .bin/.idx prefix")
    if all(isinstance(entry, str) for entry in data.train):
        weight = None if data.phases else Fraction(1)
        return [SourceSettings(PLAIN_SOURCE, tuple(data.train), weight, whole_batches=True)]
    sources = [_source(index, entry, bool(data.phases)) for index, entry in enumerate(data.train)]
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"data.train has two sources called {twice[0]}; give every source its own name")
    return sources


def training_phases(data: DataConfig) -> list[PhaseSettings]:
    """The phases of a run, at least one, the first at token 0. Raises ConfigError."""
    sources = training_sources(data)
    if not data.phases:
        weights = {source.name: source.weight for source in sources if source.weight}
        if not weights:
            raise ConfigError("data.train has no source of a weight above 0; give one")
        return [PhaseSettings(0, weights, data.context_tokens)]
    names = [source.name for source in sources]
    phases = [_phase(index, phase, names, data.context_tokens) for index, phase in enumerate(data.phases)]
    starts = [phase.start_tokens for phase in phases]
    if starts[0] != 0:
        raise ConfigError(f"data.phases[0].start_tokens={starts[0]} leaves the beginning without weights; set it to 0")
    for index, (before, after) in enumerate(zip(starts, starts[1:], strict=False)):
        if after <= before:
            key = f"data.phases[{index + 1}].start_tokens={after}"
            raise ConfigError(f"{key} is not after the phase before it, at {before}; put the phases in order")
    unused = [name for name in names if not any(name in phase.weights for phase in phases)]
    if unused:
        raise ConfigError(f"data.train names the source {unused[0]}, which no phase weighs; weigh it, or leave it out")
    return phases


def segments_of_a_row(config: Config) -> int:
    """Segments in which a row of data.context_tokens goes through the model (1: whole)."""
    size = config.train.segment_tokens
    return config.data.context_tokens // size if size else 1


def check_data(config: Config) -> None:
    """The rules of the data group and of its schedule in the run. Raises ConfigError."""
    phases = training_phases(config.data)
    step_tokens = config.train.global_batch_rows * config.data.context_tokens
    starts = [-(-phase.start_tokens // step_tokens) for phase in phases]
    for index, phase in enumerate(phases[1:], start=1):
        key = f"data.phases[{index}].start_tokens={phase.start_tokens}"
        if starts[index] == starts[index - 1]:
            raise ConfigError(f"{key} begins at step {starts[index]}, as the phase before it; set it a step or more on")
        if starts[index] >= config.train.steps:
            end = config.train.steps * step_tokens
            raise ConfigError(f"{key} is not before the end of the run at {end} tokens; leave the phase out")
    for index, phase in enumerate(phases):
        if phase.context_tokens != config.data.context_tokens:
            _check_phase_context(config, f"data.phases[{index}].context_tokens={phase.context_tokens}", phase)
    if config.train.segment_tokens:
        _check_segments(config, {config.data.context_tokens, *(phase.context_tokens for phase in phases)})


def _check_phase_context(config: Config, key: str, phase: PhaseSettings) -> None:
    """Rows of data.context_tokens are cut into shorter ones, so that a step's tokens and a micro-batch's stay equal."""
    longest = config.data.context_tokens
    if phase.context_tokens < 1 or longest % phase.context_tokens:
        rule = f"does not divide data.context_tokens={longest}, the longest of the run, whose rows it cuts"
        raise ConfigError(f"{key} {rule}; choose a divisor, or make data.context_tokens a multiple of every phase's")
    if config.data.packing != "concatenate":
        rule = f"would cut documents that data.packing={config.data.packing} keeps whole"
        raise ConfigError(f"{key} {rule}; set data.packing=concatenate, or one context for the run")
    _check_row(key, phase.context_tokens, config)


def _check_segments(config: Config, contexts: set[int]) -> None:
    """Segments cut rows of `contexts` tokens evenly and stand in a row's place for the ranks along time."""
    size = config.train.segment_tokens
    key = f"train.segment_tokens={size}"
    if config.memory.policy == "none":
        rule = "carries a recurrent memory from segment to segment, and model.backbone=attention has none"
        raise ConfigError(f"{key} {rule}; leave it at 0")
    if size >= max(contexts):
        raise ConfigError(f"{key} is no shorter than the longest row, of {max(contexts)} tokens; leave it at 0")
    uneven = [context for context in sorted(contexts) if context > size and context % size]
    if uneven:
        raise ConfigError(f"{key} does not divide rows of {uneven[0]} tokens (data.context_tokens); choose a divisor")
    _check_row(key, size, config)


def _check_row(key: str, tokens: int, config: Config) -> None:
    """What holds of any run of tokens that goes through the model at once; `key` is the setting that gives it."""
    ranks, chunk = ranks_along_time(config.parallel), config.memory.chunk_tokens
    refuse([time_problem(key, tokens, ranks, f"choose a multiple of {ranks}")])
    if chunk > longest_chunk(tokens):
        rule = f"is shorter than memory.chunk_tokens={chunk}"
        raise ConfigError(f"{key} {rule}; set memory.chunk_tokens=0 (automatic) or a shorter chunk")


def longest_chunk(tokens: int) -> int:
    """Of rows of so many tokens: the power of two that holds them, 16 or more."""
    return max(1 << (tokens - 1).bit_length(), 16)


def _source(index: int, entry: Any, phased: bool) -> SourceSettings:
    key = f"data.train[{index}]"
    if not isinstance(entry, Mapping):
        rule = "is neither all prefixes nor all sources"
        raise ConfigError(f"data.train {rule}; write every entry as a prefix, or as {{name, prefixes, weight}}")
    unknown = [str(name) for name in entry if name not in _SOURCE_KEYS]
    if unknown:
        raise ConfigError(
            f"{key}.{unknown[0]} is not a setting of a source; its settings are {', '.join(_SOURCE_KEYS)}"
        )
    name, given = entry.get("name"), entry.get("prefixes")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{key}.name={name} is no name; give every source one of letters, digits, `_`, `.` and `-`")
    prefixes = [given] if isinstance(given, str) else given
    if not isinstance(prefixes, list) or not prefixes or not all(isinstance(p, str) and p for p in prefixes):
        raise ConfigError(f"{key}.prefixes={given} names no files; give one .bin/.idx prefix or a list of them")
    if phased and "weight" in entry:
        raise ConfigError(f"{key}.weight is given beside data.phases, whose weights hold; leave it out")
    if not phased and "weight" not in entry:
        raise ConfigError(f"{key} ({name}) has no weight; give one (weights are shares of rows, of any sum)")
    weight = None if phased else _weight(f"{key}.weight", entry["weight"])
    return SourceSettings(name, tuple(prefixes), weight, whole_batches=False)


def _phase(index: int, phase: PhaseConfig, names: list[str], longest: int) -> PhaseSettings:
    key = f"data.phases[{index}]"
    unknown = [name for name in phase.weights if name not in names]
    if unknown:
        raise ConfigError(
            f"{key}.weights.{unknown[0]} is not a source of data.train; its sources are {', '.join(names)}"
        )
    given = dict(phase.weights) or ({names[0]: 1.0} if len(names) == 1 else {})
    weights = {name: _weight(f"{key}.weights.{name}", value) for name, value in given.items()}
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        raise ConfigError(f"{key}.weights={given} gives no source a weight above 0; weigh at least one")
    return PhaseSettings(phase.start_tokens, weights, longest if phase.context_tokens is None else phase.context_tokens)


def _weight(key: str, value: Any) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{key}={value} is not a weight; give a number of 0 or more")
    return Fraction(str(value))  # the decimal that was written, not the nearest binary fraction
