"""Settings of `dla-diagnose`, given as `key=value` words in Hydra's grammar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from dla_train.config import ConfigError
from dla_train.hydra_app import check_device, settings_of_words


@dataclass
class DiagnoseConfig:
    """What is compared, on which text, how far."""

    runs: list[str] = field(default_factory=list)
    """Run folders, FOLDER or FOLDER@STEP (default: the newest checkpoint); differences are against the first."""
    names: list[str] = field(default_factory=list)
    """Labels of the runs; empty takes the runs' own names, or their folders' where runs have one name."""
    seeds: list[str] = field(default_factory=list)
    """In place of runs: outputs of earlier comparisons, each of the same arms trained with another seed; intervals are
    then over seeds."""
    data: list[str] = field(default_factory=list)
    """Prefixes of token files to read; empty takes data.validation of the first run."""
    output: str = "diagnostics"
    """Folder of diagnostics.json, .npz, .md and the pictures."""
    documents: int = 256
    """Documents read, spread evenly over those long enough."""
    context_tokens: int = 0
    """Positions of a document that are scored; beyond the trained length is legal. 0 takes data.context_tokens of the
    first run."""
    minimum_tokens: int = 0
    """Shortest document that is read; 0 takes those that have every position. Fewer tokens make later positions the
    mean of fewer documents."""
    band_edges: list[int] = field(default_factory=list)
    """Positions at which the bands of the table meet; empty is 1/16, 1/4 and 1/2 of context_tokens."""
    lengths: list[int] = field(default_factory=list)
    """Lengths of text that get a perplexity; empty is the powers of two from 64 and context_tokens."""
    bins_per_doubling: int = 4
    """Points of the curves each time the position doubles."""
    confidence: float = 0.95
    """Level of the intervals."""
    batch_rows: int = 4
    """Documents that go through a model at once."""
    chunk_tokens: int = 2048
    """Tokens of a document that go through a model at once; bounds the memory of activations and logits."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    dtype: str = ""
    """`float32` or `bfloat16`; empty computes each run in its train.dtype."""


_COUNTS = {"documents": 2, "context_tokens": 0, "minimum_tokens": 0, "bins_per_doubling": 1, "batch_rows": 1}
_COUNTS["chunk_tokens"] = 1


def read_settings(words: Sequence[str]) -> DiagnoseConfig:
    """The settings of a command line, each checked. Raises ConfigError."""
    settings = settings_of_words(words, DiagnoseConfig, "dla-diagnose")
    _check(settings)
    return settings


def _check(settings: DiagnoseConfig) -> None:
    given = settings.runs
    if settings.seeds:
        _check_seeds(settings)
    elif len(given) < 2:
        raise ConfigError(f"runs={given} names {len(given)} runs, a comparison needs two; write runs=[FOLDER,FOLDER]")
    if settings.names and (len(settings.names) != len(given) or len(set(settings.names)) < len(given)):
        raise ConfigError(f"names={settings.names} must be {len(given)} different names, one for each of runs")
    for key, least in _COUNTS.items():
        if getattr(settings, key) < least:
            raise ConfigError(f"{key}={getattr(settings, key)} must be at least {least}")
    if not 0.5 <= settings.confidence < 1:
        raise ConfigError(f"confidence={settings.confidence} must be at least 0.5 and below 1")
    check_device(settings.device, settings.dtype)


def _check_seeds(settings: DiagnoseConfig) -> None:
    if len(settings.seeds) < 2:
        raise ConfigError(f"seeds={settings.seeds} names one comparison; give those of two seeds or more")
    used, default = ("seeds", "output", "confidence"), DiagnoseConfig()
    for item in fields(settings):
        if item.name not in used and getattr(settings, item.name) != getattr(default, item.name):
            raise ConfigError(f"{item.name} is not used with seeds, which reads what was compared before; leave it out")
