"""A checkpoint folder of somebody else: its config.json and safetensors, read without trust.

Nothing is unpickled and no code of the folder runs. Every tensor is taken by name and shape, and what nobody took is an
error at the end, so that no weight is dropped in silence.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dla_train.checkpoint.errors import CheckpointError
from dla_train.checkpoint.tensor_files import StoredTensors
from dla_train.huggingface.errors import FolderError

CONFIG_BYTES = 2**24
"""Largest config.json or index that is read."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 4


class Settings:
    """A JSON object whose values are asked for by key and type. Raises FolderError for what is absent or of another."""

    def __init__(self, values: dict[str, Any], origin: str) -> None:
        self.values, self.origin = values, origin

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A count of at least `least`."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(key, value, f"an integer of at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def part(self, key: str) -> Settings:
        """A nested object; empty where it is absent."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Settings(value, f"{self.origin}: {key}")

    def require(self, key: str, expected: tuple[Any, ...], feature: str) -> None:
        """Refuse a value other than `expected`, the first of which is the default: it is `feature`, which we lack."""
        value = self.values.get(key, expected[0])
        if not any(type(value) is type(legal) and value == legal for legal in expected):
            raise FolderError(
                f"{self.origin}: {key}={str(value)[:60]} is {feature}, which this model cannot express; "
                f"only {' or '.join(str(legal) for legal in expected)} can be imported"
            )

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise FolderError(f"{self.origin} lacks {key}; is the folder complete?")
        return default if value is None else value

    def _wrong(self, key: str, value: Any, wanted: str) -> FolderError:
        return FolderError(f"{self.origin}: {key}={str(value)[:60]} is not {wanted}; mend the file or fetch it again")


class Source:
    """A foreign folder opened for import."""

    def __init__(self, folder: Path) -> None:
        """Raises FolderError where there is no config.json or no safetensors, and for damage."""
        if not folder.is_dir():
            raise FolderError(f"{folder} is not a folder; give a checkpoint in Hugging Face layout")
        self.folder = folder
        self.config = Settings(read_object(folder / "config.json"), str(folder / "config.json"))
        try:
            self._stored = StoredTensors(folder, weight_files(folder))
        except CheckpointError as error:
            raise FolderError(f"{error}; fetch the file again") from error
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises FolderError where it is absent."""
        if name not in self._stored:
            raise FolderError(
                f"{self.folder} lacks the tensor {name}; is the folder complete, and of this architecture?"
            )
        return self._stored.entry(name)[1]

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor as float32, which must have `shape`. Raises FolderError."""
        found = self.shape(name)
        kind = self._stored.entry(name)[0]
        if found != shape:
            raise FolderError(
                f"{self.folder}: {name} has shape {list(found)} where its config.json says {list(shape)}; "
                "one of them belongs to another model"
            )
        if kind not in _FLOATS:
            raise FolderError(f"{self.folder}: {name} holds {kind}; quantised weights cannot be imported, fetch others")
        self._taken.add(name)
        try:
            return self._stored[name].to(torch.float32)
        except CheckpointError as error:
            raise FolderError(f"{error}; fetch the file again") from error

    def check_all_taken(self) -> None:
        """Raises FolderError, naming them, where tensors are left that no part of the model came from."""
        left = sorted(name for name in self._stored if name not in self._taken)
        if left:
            more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
            raise FolderError(
                f"{self.folder} holds tensors that this import has no place for: {', '.join(left[:_SHOWN])}{more}; "
                "the model has parts that cannot be expressed"
            )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises FolderError."""
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES + 1)
        values = json.loads(text.decode("utf-8")) if len(text) <= CONFIG_BYTES else None
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}; is the folder complete?") from error
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path} is not JSON: {str(error)[:80]}; fetch it again") from error
    if not isinstance(values, dict):
        raise FolderError(f"{path} is not a JSON object of at most {CONFIG_BYTES:,} bytes; fetch it again")
    return values


def weight_files(folder: Path) -> list[str]:
    """Names of a folder's safetensors files. Raises FolderError where there are none, and names pickles as such."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise FolderError(f"{index} has no weight_map of names to files; fetch it again")
        names = sorted(set(places.values()))
        outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if outside:
            raise FolderError(f"{index} names {outside[0][:60]!r}, which is no safetensors file beside it")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise FolderError(f"{index} names {absent[0]}, which is absent; fetch it")
        return names
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise FolderError(
                f"{folder} holds {pickles[0]}, a pickle, which can run any code when opened and is not read here; "
                "convert it where you trust it: safetensors.torch.save_file({k: v.clone() for k, v in torch.load('"
                f"{pickles[0]}', weights_only=True).items()}}, 'model.safetensors')"
            )
        raise FolderError(f"{folder} holds no .safetensors file; fetch the weights")
    return names
