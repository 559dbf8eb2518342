"""Models from run directories, with the weights of a checkpoint; no process group."""

from __future__ import annotations

from pathlib import Path

import torch

from dla_train.checkpoint.manifest import TRAINER
from dla_train.checkpoint.state import check_shapes
from dla_train.checkpoint.stored import StoredCheckpoint, open_step
from dla_train.config import Config
from dla_train.hydra_app import config_from_dict
from dla_train.models.build import build_model
from dla_train.models.language_model import LanguageModel


def load_model(
    run_dir: str | Path, step: int | None = None, device: str | torch.device = "cpu", *, dtype: str | None = None
) -> tuple[LanguageModel, Config, int]:
    """(model in evaluation mode, its run's configuration, optimizer steps it was trained for).

    `step` None takes the newest complete checkpoint; `dtype` None computes in the run's train.dtype. Raises
    CheckpointError where there is none, naming those there are, and where a file that is read is not what was written.
    """
    checkpoint, chosen = open_step(run_dir, step)
    checkpoint.verify([TRAINER, *checkpoint.manifest.of_kind("model")])
    config = stored_config(checkpoint)
    config.train.dtype = dtype or config.train.dtype
    model = build_model(config, device)
    load_weights(model, checkpoint)
    return model.eval(), config, chosen


def stored_config(checkpoint: StoredCheckpoint) -> Config:
    """The configuration of the run that wrote a checkpoint. Raises CheckpointError, ConfigError."""
    return config_from_dict(checkpoint.trainer()["config"])


@torch.no_grad()
def load_weights(model: LanguageModel, checkpoint: StoredCheckpoint) -> None:
    """Fill a model's parameters and buffers in place. Raises CheckpointError if those stored are of another one."""
    state, stored = model.state_dict(), checkpoint.tensors("model")
    check_shapes(checkpoint.folder, stored, {f"model/{name}": tuple(tensor.shape) for name, tensor in state.items()})
    for name, tensor in state.items():
        tensor.copy_(stored[f"model/{name}"])
