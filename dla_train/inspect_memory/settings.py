"""Settings of `dla-inspect`, given as `key=value` words in Hydra's grammar; `text=` takes everything after it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dla_train.config import ConfigError
from dla_train.hydra_app import check_device, settings_of_words

ALL = "all"
STANDARD_INPUT = "-"


@dataclass
class InspectConfig:
    """Which checkpoint, which text, which heads."""

    run: str = ""
    """Run folder (configuration and checkpoints)."""
    step: int = 0
    """Checkpoint of this step; 0 takes the newest complete one."""
    text: str = ""
    """The text itself."""
    file: str = ""
    """Or a UTF-8 file that holds it; - reads standard input."""
    layer: str = ALL
    """Layer, from 0, or `all`."""
    head: str = ALL
    """Head, from 0, or `all`."""
    output: str = "inspection"
    """Folder of index.html and the pictures."""
    max_tokens: int = 2048
    """Longest text; the page grows with tokens x heads x states, and tokens become narrower than a pixel."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    dtype: str = ""
    """`float32` or `bfloat16`; empty computes in the run's train.dtype."""


def read_settings(words: Sequence[str]) -> InspectConfig:
    """The settings of a command line, each checked as far as it can be without the run. Raises ConfigError."""
    settings = settings_of_words(words, InspectConfig, "dla-inspect", verbatim=("text",))
    if not settings.run:
        raise ConfigError("run has no value; name a run folder: dla-inspect run=runs/... file=text.txt")
    if bool(settings.text) == bool(settings.file):
        both = "text and file are both given" if settings.text else "there is no text"
        raise ConfigError(f"{both}; write one of text='...', file=FILE and file=- (standard input)")
    for key in ("layer", "head"):
        value = getattr(settings, key)
        if value != ALL and not value.isdecimal():
            raise ConfigError(f"{key}={value} is neither a number from 0 nor {ALL}; write {key}=0 or {key}={ALL}")
    for key, least in (("step", 0), ("max_tokens", 2)):
        if getattr(settings, key) < least:
            raise ConfigError(f"{key}={getattr(settings, key)} is below {least}; use {least} or more")
    check_device(settings.device, settings.dtype)
    return settings


def read_text(settings: InspectConfig) -> str:
    """The text of the command line, a file or standard input. Raises ConfigError."""
    if settings.text:
        return settings.text
    try:
        raw = sys.stdin.buffer.read() if settings.file == STANDARD_INPUT else Path(settings.file).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"file={settings.file} cannot be read: {error.strerror}; give a file that holds text"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"file={settings.file} is not UTF-8 (byte {error.start}); convert it first") from error
