"""The command line's side of the configuration: Hydra composes YAML groups, this module makes a `Config` of them.

Owns the registration of the schema, the search for the configs folder, and exit code 2 after a mistake; what a user
then reads is in config_sentences.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dla_train.config import CHOICES, MISTAKE, Config, ConfigError
from dla_train.config_rules import validate
from dla_train.config_sentences import (
    GROUPS,
    USUAL_NAMES,
    explain,
    leaves,
    setting_names,
    several_values,
    unknown_setting,
    unreadable,
    wrong_value,
)
from dla_train.group_choices import refuse_choices_without_effect
from dla_train.initial_model import initial_setting
from dla_train.run_process import PointError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
"""A dataclass of a small program's settings."""

FAILED = 1
"""Exit code after a multirun with points that failed."""


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


def compose(overrides: list[str], options: Collection[str] = ()) -> Config:
    """The configuration of a command line, e.g. `["experiment=quickstart"]`, unchecked. Raises ConfigError.

    options: what the program takes beside settings, for who misspells one.
    """
    register_schema()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_directory())):
        try:
            composed = hydra.compose("config", overrides)
            refuse_choices_without_effect(overrides, composed, GROUPS, [config_directory()])
            return to_config(composed)
        except (HydraException, OmegaConfBaseException) as error:
            unknown = functools.partial(unknown_setting, options=options)
            raise ConfigError(explain(error, unknown)) from error


def to_config(composed: DictConfig) -> Config:
    """The dataclasses of a composed configuration. Raises ConfigError on an unknown key or a missing value."""
    try:
        return _to_config(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


def _to_config(composed: DictConfig) -> Config:
    known = setting_names()
    for key in leaves(composed):
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
    composed = OmegaConf.structured(schema)
    for word in words:
        key, _, value = word.partition("=")
        if key not in verbatim:
            key, value = _parsed(word, program)
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise ConfigError(f"{key} is not a setting of {program}; {advice}")
        try:
            composed[key] = value
        except OmegaConfBaseException as error:
            raise ConfigError(wrong_value(word, error)) from error
    settings = OmegaConf.to_object(composed)
    assert isinstance(settings, schema)
    return settings


def _parsed(word: str, program: str) -> tuple[str, Any]:
    try:
        parsed = OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ConfigError(unreadable(word, f"{program} --help")) from error
    if parsed.is_sweep_override():
        raise ConfigError(several_values(word, multirun=False))
    return str(parsed.key_or_group), parsed.value()


def check_device(device: str, dtype: str) -> None:
    """Raise ConfigError where a small program's settings of these names are not a run's; dtype may be empty."""
    for key, value, choices in (("device", device, CHOICES["train.device"]), ("dtype", dtype, CHOICES["train.dtype"])):
        if value not in choices and (key, value) != ("dtype", ""):
            raise ConfigError(f"{key}={value} is not one of {', '.join(choices)}")


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
            words = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # a ${name} is not theirs
            refuse_choices_without_effect(cast(list[str], words), composed, GROUPS, _config_folders())
            config = checked_config(composed, int(os.environ.get("WORLD_SIZE", "1")))
        except ConfigError as error:
            raise SystemExit(_report(str(error))) from error
        try:
            job(config)
        except user_errors as error:
            _report(str(error), every_rank=True)
            raise SystemExit(getattr(error, "exit_code", MISTAKE)) from error

    try:
        _refuse_multirun_under_torchrun()
        _refuse_dashes()
        hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")(application)()
    except ConfigError as error:
        return _report(str(error))
    except PointError as error:
        _report(f"{error}, and so may others; the same command goes on with what has not finished")
        return FAILED
    except (HydraException, OmegaConfBaseException) as error:
        return _report(explain(error, multirun=True))
    return 0


def checked_config(composed: DictConfig, world_size: int) -> Config:
    """The validated configuration of a job for so many ranks. Raises ConfigError."""
    config = to_config(composed)
    validate(config, world_size)
    return config


def _refuse_multirun_under_torchrun() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"-m", "--multirun"} & set(sys.argv[1:]):
        raise ConfigError("--multirun starts processes, and is no rank of torchrun; RANKS=n dla-train --multirun ...")


def _refuse_dashes() -> None:
    """A setting written as a flag: argparse, which reads Hydra's own flags, would tell of those alone."""
    known = {*GROUPS, *USUAL_NAMES, "experiment", *(name.rpartition(".")[2] for name in setting_names())}
    for word in sys.argv[1:]:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and (name in known or "." in name):
            raise ConfigError(unreadable(word, "dla-train --cfg job"))


def _report(message: str, every_rank: bool = False) -> int:
    """Print a mistake; one of the configuration is the same on every rank, one of the files may not be."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or every_rank:
        print(f"dla-train: error: {message}" + ("" if rank == "0" else f" (rank {rank})"), file=sys.stderr)
    return MISTAKE
