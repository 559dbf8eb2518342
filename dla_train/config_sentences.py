"""What settings there are, and the sentences a user reads after a mistake in one.

Hydra's own messages name its internals, so each is translated: the key, the nearest legal one, the mend.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterator

from hydra.errors import MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ValidationError

from dla_train.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LoggingConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ResilienceConfig,
)

GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "memory": MemoryConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "evaluation": EvaluationConfig,
    "parallel": ParallelConfig,
    "engine": EngineConfig,
    "checkpoint": CheckpointConfig,
    "resilience": ResilienceConfig,
    "logging": LoggingConfig,
}
"""Hydra groups that fill one node of the configuration; `experiment` fills any."""


@functools.cache
def setting_names() -> tuple[str, ...]:
    """Every legal dotted key, `model.width` and so on, in the order of the schema."""
    return tuple(leaves(OmegaConf.structured(Config)))


def leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted keys below a node, in its order, each after `prefix`."""
    for key in node:
        name = prefix + str(key)
        child = MISSING if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(child, DictConfig):
            yield from leaves(child, f"{name}.")
        else:
            yield name


def unknown_setting(key: str) -> str:
    """The sentence about a key that is not in the schema, with the nearest one that is."""
    names = setting_names()
    near = difflib.get_close_matches(key, [*names, *GROUPS, "experiment"], n=1, cutoff=0.6)
    same_leaf = [name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    meant = (same_leaf or near or [""])[0]
    advice = f"did you mean {meant}?" if meant else "`dla-train --cfg job` prints every setting"
    return f"{key} is not a setting; {advice}"


def explain(
    error: Exception, unknown: Callable[[str], str] = unknown_setting, listing: str = "dla-train --cfg job"
) -> str:
    """One sentence for an error of Hydra or OmegaConf: what was given, what is legal.

    unknown: the sentence about a key that is not in the schema, listing: the command that prints every legal one; by
    default of a training run.
    """
    for cause in _causes(error):
        if isinstance(cause, ConfigError):  # of an interpolation
            return str(cause)
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file and cause.options is not None:
            return _unknown_option(cause.missing_cfg_file, list(cause.options))
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.full_key:
            return unknown(str(cause.full_key))
        if isinstance(cause, ValidationError) and cause.full_key:
            return _wrong_type(cause)
    if group := re.match(r"Could not override '(\w+)'", str(error)):  # with an option, where there is no such group
        return unknown(group[1])
    first_line = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return f"{first_line}; write overrides as key=value, `{listing}` prints every setting"


def _unknown_option(wanted: str, options: list[str]) -> str:
    group, _, option = wanted.rpartition("/")
    plugin = option.partition("_")[0]
    if group == "hydra/launcher" and plugin in ("joblib", "submitit"):
        return f"hydra/launcher={option} needs the package hydra-{plugin}-launcher; pip install 'dla-train[sweep]'"
    legal = [name for name in options if not name.startswith("base_")]
    near = difflib.get_close_matches(option, legal, n=1, cutoff=0.5)
    meant = f"did you mean {group}={near[0]}? " if near else ""
    return f"{group}={option} is not an option of the group {group}; {meant}choose from {', '.join(legal)}"


def _wrong_type(error: ValidationError) -> str:
    reason = str(error).splitlines()[0]
    key: str = str(error.full_key)
    return f"{key}: {reason[0].lower()}{reason[1:]}; give a value of the setting's type"


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
