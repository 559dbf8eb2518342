"""Models of a run's configuration: on the meta device, where they cost nothing, and initialised."""

from __future__ import annotations

import torch

from dla_train.config import Config
from dla_train.models.init import init_weights
from dla_train.models.language_model import LanguageModel
from dla_train.parallel.axes import Axes

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""torch types of train.dtype."""


def meta_model(config: Config, axes: Axes | None = None) -> LanguageModel:
    """The model of a run, or a rank's part of it, without storage: `init_weights` or an engine gives it some.

    axes: the ranks that share it (default: one rank). Raises ConfigError where it does not divide over them.
    """
    return LanguageModel(
        config.model,
        config.memory,
        compute_dtype=COMPUTE_DTYPES[config.train.dtype],
        recompute=config.train.recompute,
        device=torch.device("meta"),
        axes=axes,
    )


def build_model(config: Config, device: str | torch.device, axes: Axes | None = None) -> LanguageModel:
    """The freshly initialised model of a run on `device`, the same for any device and number of ranks."""
    return init_weights(meta_model(config, axes), config.seed, device=device)
