"""The command line's side of the configuration: Hydra composes YAML groups, this module makes a `Config` of them.

Owns the registration of the schema, the search for the configs folder, and the sentences a user reads after a mistake.
Hydra's own messages name its internals, so each is translated: the key, the nearest legal one, the mend; exit code 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

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
from dla_train.config_rules import validate
from dla_train.group_choices import refuse_choices_without_effect
from dla_train.initial_model import initial_setting
from dla_train.run_process import PointError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
"""A dataclass of a small program's settings."""

MISTAKE = 2
"""Exit code after a mistake in the configuration, the data or the run directory."""
FAILED = 1
"""Exit code after a multirun with points that failed."""

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
def register_schema() -> None:
    """Register `base_config` and one `base_<group>` per group, the nodes that the YAML files extend; once a process."""
    store = ConfigStore.instance()
    store.store(name="base_config", node=Config)
    for group, node in GROUPS.items():
        store.store(group=group, name=f"base_{group}", node=node)
    OmegaConf.register_new_resolver("initial_model", initial_setting, replace=True)


def config_directory() -> Path:
    """The configs folder: inside an installed package, else beside it in a source tree. Raises ConfigError."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"no configs folder in {package} or beside it; reinstall dla-train, or pass --config-dir")


def _config_folders() -> list[Path]:
    """Where Hydra looked for the options of the running job, in its order."""
    sources = HydraConfig.get().runtime.config_sources
    return [Path(source.path) for source in sources if source.schema == "file"]


def compose(overrides: list[str]) -> Config:
    """The configuration of a command line, e.g. `["experiment=quickstart"]`, unchecked. Raises ConfigError."""
    register_schema()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_directory())):
        try:
            composed = hydra.compose("config", overrides)
            refuse_choices_without_effect(overrides, composed, GROUPS, [config_directory()])
            return to_config(composed)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error)) from error


def to_config(composed: DictConfig) -> Config:
    """The dataclasses of a composed configuration. Raises ConfigError on an unknown key or a missing value."""
    try:
        return _to_config(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


def _to_config(composed: DictConfig) -> Config:
    known = setting_names()
    for key in _leaves(composed, ""):
        if key not in known:
            raise ConfigError(unknown_setting(key))
    absent = OmegaConf.missing_keys(composed)
    missing = [name for name in known if name in absent]
    if missing:
        listed = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise ConfigError(f"{listed}: no value given; set it, e.g. {missing[0]}=..., or start from an experiment=...")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def config_from_dict(values: dict[str, Any]) -> Config:
    """The configuration from nested plain values, as a checkpoint holds them. Raises ConfigError."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), values)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(merged, DictConfig)
    return to_config(merged)


def config_to_yaml(config: Config) -> str:
    """The configuration as YAML, every value written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def settings_of_words(
    words: Sequence[str], schema: type[Settings], program: str, *, verbatim: Collection[str] = ()
) -> Settings:
    """The settings of a small program from `key=value` words, values in Hydra's grammar. Raises ConfigError.

    verbatim: keys whose value is everything after the `=`, for text in which brackets and commas mean nothing.
    """
    known = [item.name for item in dataclasses.fields(schema)]
    values: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in verbatim:
            key, value = _parsed(word)
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise ConfigError(f"{key} is not a setting of {program}; {advice}")
        values[key] = value
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key or error.key}: {reason}; give a value of its type") from error
    assert isinstance(settings, schema)
    return settings


def _parsed(word: str) -> tuple[str, Any]:
    try:
        parsed = OverridesParser.create().parse_override(word)
        return str(parsed.key_or_group), parsed.value()
    except HydraException as error:
        raise ConfigError(f"{word}: {str(error).splitlines()[0]}; write key=value") from error


def defaults_of(schema: type[DataclassInstance]) -> str:
    """One indented line `key=default` for every setting of a small program, for its help."""
    lines = []
    for item in dataclasses.fields(schema):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        lines.append(f"  {item.name}={default}")
    return "\n".join(lines)


def run_application(
    job: Callable[[Config], Any], user_errors: tuple[type[Exception], ...], point: Callable[[DictConfig], None]
) -> int:
    """Compose the command line, check it, run `job` on it. Returns the exit code: 2 after a user's mistake.

    `user_errors` are the errors of `job` that are shown as one paragraph without a traceback. Under torchrun every rank
    makes the same configuration, so rank 0 alone reports a mistake in it. An error may name its own `exit_code`. In a
    multirun Hydra calls `point` instead, wherever its launcher says, on every point; 1 if one raises PointError.
    """
    register_schema()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach this function instead of Hydra's own printer

    def application(composed: DictConfig) -> None:
        register_schema()  # Hydra's launchers may call this in other processes
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return point(composed)
        try:
            refuse_choices_without_effect(HydraConfig.get().overrides.task, composed, GROUPS, _config_folders())
            job(checked_config(composed, int(os.environ.get("WORLD_SIZE", "1"))))
        except user_errors as error:
            _report(str(error), every_rank=True)
            raise SystemExit(getattr(error, "exit_code", MISTAKE)) from error

    try:
        _refuse_multirun_under_torchrun()
        hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")(application)()
    except ConfigError as error:
        return _report(str(error))
    except PointError as error:
        _report(f"{error}, and so may others; the same command goes on with what has not finished")
        return FAILED
    except (HydraException, OmegaConfBaseException) as error:
        return _report(explain(error))
    return 0


def checked_config(composed: DictConfig, world_size: int) -> Config:
    """The validated configuration of a job for so many ranks. Raises ConfigError."""
    config = to_config(composed)
    validate(config, world_size)
    return config


def _refuse_multirun_under_torchrun() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"-m", "--multirun"} & set(sys.argv[1:]):
        raise ConfigError("--multirun starts processes, and is no rank of torchrun; RANKS=n dla-train --multirun ...")


def _report(message: str, every_rank: bool = False) -> int:
    """Print a mistake; one of the configuration is the same on every rank, one of the files may not be."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or every_rank:
        print(f"dla-train: error: {message}" + ("" if rank == "0" else f" (rank {rank})"), file=sys.stderr)
    return MISTAKE


@functools.cache
def setting_names() -> tuple[str, ...]:
    """Every legal dotted key, `model.width` and so on, in the order of the schema."""
    return tuple(_leaves(OmegaConf.structured(Config), ""))


def _leaves(node: DictConfig, prefix: str) -> Iterator[str]:
    for key in node:
        name = prefix + str(key)
        child = MISSING if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(child, DictConfig):
            yield from _leaves(child, f"{name}.")
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
