"""What a plan is made for: the number and kind of devices, and how well they are assumed to be used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dla_train.config import ConfigError

DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Target:
    """Options of a dry run that no training run has."""

    world_size: int = 0
    """Ranks; 0 takes parallel.tensor x parallel.context."""
    mfu: float = 0.4
    """Share of the peak that useful FLOPs are assumed to reach."""
    peak_tflops: float = 989.0
    """Peak of one device in TFLOP/s: dense bfloat16 of an H100 or H200."""
    device: str = "cuda"
    """What `train.device=auto` stands for: `cuda` or `cpu`."""
    device_gb: float = 80.0
    """Memory of a device that a run may use, 1e9 bytes; an H100's 85.5 less what CUDA, NCCL and fragments take."""
    packed: bool = True
    """Rows hold several documents, as the loader packs them; false: one document a row, for which attention needs no
    mask."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ConfigError(f"device={self.device} is not one of the choices; choose from {', '.join(DEVICES)}")
        if self.world_size < 0:
            raise ConfigError(f"world_size={self.world_size} is below 0; use 1 or more ranks")
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"mfu={self.mfu} lies outside (0, 1]; use the share of the peak, such as 0.4")
        for key in ("peak_tflops", "device_gb"):
            value = getattr(self, key)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{key}={value} is not above 0; use a positive number")

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Target:
        """From words of a command line. Raises ConfigError naming the option and what it takes."""
        return cls(**{item.name: _parsed(item.name, given[item.name]) for item in fields(cls) if item.name in given})


def _parsed(key: str, word: str) -> Any:
    if key == "device":
        return word
    if key == "packed":
        if word.lower() not in ("true", "false"):
            raise ConfigError(f"packed={word} is neither true nor false; use packed=true or packed=false")
        return word.lower() == "true"
    try:
        return int(word) if key == "world_size" else float(word)
    except ValueError as error:
        kind = "a whole number" if key == "world_size" else "a number"
        raise ConfigError(f"{key}={word} is not {kind}; use {key}={getattr(Target, key)} or the like") from error
