"""An option of a group whose values an experiment then sets itself: what was asked for would silently not be done."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dla_train.config import ConfigError


def refuse_choices_without_effect(
    words: Sequence[str], composed: DictConfig, groups: Collection[str], folders: Sequence[Path]
) -> None:
    """Raise ConfigError where `group=option` among the words says one value and the configuration holds another.

    An experiment is composed after the groups, so what it sets stands whatever option is chosen; a word
    `group.key=value` comes after both, and settles it. folders: where options' files are looked for, in this order.
    """
    parsed = [word for word in OverridesParser.create().parse_overrides(list(words)) if not word.is_delete()]
    given = {str(word.key_or_group): word.value() for word in parsed}  # of one key the last word counts
    experiment = given.get("experiment")
    if experiment is None:
        return
    for group, option in given.items():
        if group not in groups or not isinstance(option, str):
            continue
        for key, value in _values(group, option, folders).items():
            name = f"{group}.{key}"
            set_to = OmegaConf.select(composed, name, default=value)
            if set_to != value and name not in given:
                raise ConfigError(
                    f"{group}={option} says {name}={value}, but experiment={experiment} sets it to {set_to}, and an "
                    f"experiment's own settings stand; add {name}={value}, or {name}={set_to} to keep the experiment's"
                )


def _values(group: str, option: str, folders: Sequence[Path]) -> dict[str, object]:
    """What an option's own file sets, if there is one, without values that refer to others or are to be given."""
    path = next((path for folder in folders if (path := folder / group / f"{option}.yaml").is_file()), None)
    if path is None:
        return {}
    loaded = OmegaConf.load(path)
    assert isinstance(loaded, DictConfig)
    keys = [str(key) for key in loaded if key != "defaults" and not OmegaConf.is_missing(loaded, key)]
    return {key: loaded[key] for key in keys if not OmegaConf.is_interpolation(loaded, key)}
