"""What a model folder says of itself: its `ModelConfig` and `MemoryConfig`, without torch.

`dla-export` and `dla-import` write folders, `train.initial` names one. Its settings are read while a configuration is
composed (`${initial_model:${train.initial},width}` in configs/experiment/upcycle.yaml), so this stays light.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from dla_train.config import ConfigError, MemoryConfig, ModelConfig

MODEL_TYPE = "dla"
"""What config.json of a folder of ours says it is."""
CONFIG_BYTES = 2**24
"""Largest config.json that is read."""


def read_initial_model(folder: str | Path) -> tuple[ModelConfig, MemoryConfig]:
    """The model and memory settings of a folder. Raises ConfigError for anything but a folder of ours."""
    path = Path(folder) / "config.json"
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES + 1)
        values = json.loads(text.decode("utf-8")) if len(text) <= CONFIG_BYTES else None
    except OSError as error:
        raise ConfigError(f"train.initial={folder}: {path} cannot be read: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"train.initial={folder}: {path} is not JSON; write the folder again") from error
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        raise ConfigError(
            f"train.initial={folder} is not a model folder of dla-export or dla-import; make one of a foreign "
            "checkpoint with `dla-import FOLDER --output ...`"
        )
    return _filled(folder, ModelConfig, values.get("architecture")), _filled(folder, MemoryConfig, values.get("memory"))


def initial_setting(folder: str | None, key: str) -> Any:
    """One model setting of the folder at train.initial, for an interpolation. Raises ConfigError."""
    if folder is None:
        raise ConfigError(f"train.initial is not set, and model.{key} is taken from it; give train.initial=FOLDER")
    return getattr(read_initial_model(folder)[0], key)


def _filled(folder: str | Path, kind: type[Any], values: Any) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given = values if isinstance(values, dict) else {}
    wrong = sorted(given.keys() - fields.keys()) or sorted(
        name for name, field in fields.items() if not _fits(given.get(name, field.default), str(field.type))
    )
    if wrong:
        raise ConfigError(
            f"train.initial={folder}: config.json has no usable {wrong[0]} for {kind.__name__}; write the folder again "
            "with this version"
        )
    return kind(**given)


def _fits(value: Any, kind: str) -> bool:
    if value == MISSING:
        return False
    if kind == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value).__name__ == kind
