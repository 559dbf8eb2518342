"""Beginning a run with the weights of a model folder (`train.initial`): weights alone, moments fresh, step 0.

The backbone's tensors must all be there and fit. The memory's own parameters (`*.reader.*`) are taken where the run has
the folder's memory; a run with another memory initialises them, which leaves a single-state source what it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dla_train.checkpoint.errors import CheckpointError
from dla_train.checkpoint.tensor_files import StoredTensors
from dla_train.config import Config, ConfigError, MemoryConfig
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.foreign import weight_files
from dla_train.huggingface.writing import PREFIX
from dla_train.initial_model import read_initial_model
from dla_train.logical_state import LogicalState
from dla_train.models.init import initial_value

logger = logging.getLogger(__name__)
_FREE = ("name", "init_std")
_MEMORY_FREE = ("backend", "chunk_tokens", "gain_init", "sharpness_init", "gate_temperature", "gate_temperature_final")
_SHOWN = 4


def begin_with(engine: LogicalState, config: Config) -> None:
    """Load the weights of the folder at train.initial into an engine, as before its first step. Collective.

    Raises ConfigError where the run's model is another one, and where files are absent, damaged or incomplete.
    """
    folder = Path(str(config.train.initial))
    model, memory = read_initial_model(folder)
    for key, value in vars(model).items():
        if key not in _FREE and getattr(config.model, key) != value:
            raise ConfigError(
                f"model.{key}={getattr(config.model, key)} is not the {value} of train.initial={folder}; set it so, or "
                "use experiment=upcycle, which takes the model's settings from the folder"
            )
    same = _settings(memory) == _settings(config.memory)
    state = InitialState(folder, config, engine.shapes(), same)
    engine.import_state(state, 0)
    what = "with its memory" if same else f"a new {config.memory.policy} memory"
    logger.info("begins with the weights of %s, %s", folder, what)


class InitialState(Mapping[str, Tensor]):
    """An engine's state before its first step: weights of the folder, whole, float32; moments zero."""

    def __init__(self, folder: Path, config: Config, shapes: Mapping[str, tuple[int, ...]], memory_too: bool) -> None:
        """memory_too: whether the memory's own parameters are the folder's. Raises ConfigError."""
        self._config, self._shapes, self._memory_too = config, shapes, memory_too
        try:
            self._stored = StoredTensors(folder, weight_files(folder))
        except (FolderError, CheckpointError) as error:
            raise ConfigError(f"train.initial={folder}: {error}") from error
        wanted = {name.partition("/")[2] for name in shapes if name.startswith("model/")}
        wanted = {name for name in wanted if self._is_taken(name)}
        there = {name.removeprefix(PREFIX) for name in self._stored}
        there = {name for name in there if self._is_taken(name)}
        wrong = sorted(wanted ^ there) or sorted(
            name for name in wanted if self._stored.entry(PREFIX + name)[1] != tuple(shapes[f"model/{name}"])
        )
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise ConfigError(
                f"train.initial={folder} does not hold the model its config.json describes: {', '.join(wrong[:_SHOWN])}"
                f"{more} absent, too many or of another shape; write the folder again"
            )

    def __getitem__(self, name: str) -> Tensor:
        kind, _, rest = name.partition("/")
        shape = self._shapes[name]
        if kind == "optim":
            return torch.zeros(shape)
        if self._is_taken(rest):
            return self._stored[PREFIX + rest].to(torch.float32)
        return initial_value(rest, shape, self._config.seed, self._config.model, self._config.memory)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _is_taken(self, name: str) -> bool:
        return self._memory_too or ".reader." not in name


def _settings(memory: MemoryConfig) -> dict[str, object]:
    """What decides the shapes and the meaning of the memory's parameters, and what it does with them."""
    return {key: value for key, value in vars(memory).items() if key not in _MEMORY_FREE}
