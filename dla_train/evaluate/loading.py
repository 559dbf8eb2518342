"""Models from run directories, with the weights of a checkpoint; no process group."""

from __future__ import annotations

from pathlib import Path

import torch

from dla_train.checkpoint.checkpointer import TENSORS, read_trainer_state
from dla_train.checkpoint.folders import CheckpointError, checkpoint_folder, complete_steps
from dla_train.checkpoint.state import check_shapes, read_tensors
from dla_train.config import Config
from dla_train.hydra_app import config_from_dict
from dla_train.models.build import build_model
from dla_train.models.language_model import LanguageModel


def load_model(
    run_dir: str | Path, step: int | None = None, device: str | torch.device = "cpu"
) -> tuple[LanguageModel, Config, int]:
    """(model in evaluation mode, its run's configuration, optimizer steps it was trained for).

    `step` None takes the newest complete checkpoint. Raises CheckpointError where there is none, naming those there
    are.
    """
    root = Path(run_dir) / "checkpoints"
    steps = complete_steps(root)
    if not steps:
        raise CheckpointError(f"{root} holds no complete checkpoint; train first, or check the path")
    if step is not None and step not in steps:
        raise CheckpointError(f"{root} has no checkpoint of step {step}; choose from {', '.join(map(str, steps))}")
    chosen = steps[-1] if step is None else step
    folder = checkpoint_folder(root, chosen)
    config = config_from_dict(read_trainer_state(folder)["config"])
    model = build_model(config, device)
    load_weights(model, folder / TENSORS)
    return model.eval(), config, chosen


@torch.no_grad()
def load_weights(model: LanguageModel, folder: Path) -> None:
    """Fill a model's parameters and buffers in place. Raises CheckpointError if those stored are of another one."""
    state = model.state_dict()
    check_shapes(folder, {f"model/{name}": tuple(tensor.shape) for name, tensor in state.items()}, ("model/",))
    stored = read_tensors(folder, [f"model/{name}" for name in state])
    for name, tensor in state.items():
        tensor.copy_(stored[f"model/{name}"])
