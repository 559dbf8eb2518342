"""How published single-state models become ours: architecture by architecture, tensor by tensor.

A conversion reads the foreign settings, refuses by name what our backbones cannot express, and returns the backbone's
tensors under logical names. Fused projections are cut into the parts that heads and groups own. The memory's own
parameters are not here: they are initialised so that the model computes what the source does.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dla_train.config import ModelConfig
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.foreign import Source
from dla_train.huggingface.foreign_gated_deltanet import gated_deltanet, qwen3_next
from dla_train.huggingface.foreign_mamba2 import mamba2, state_spaces
from dla_train.huggingface.foreign_parts import Converted
from dla_train.initial_model import MODEL_TYPE


def convert(source: Source, name: str) -> tuple[str, ModelConfig, dict[str, Tensor]]:
    """(what it was, our model named `name`, its tensors). Raises FolderError for what cannot be expressed."""
    kind = _kind(source)
    model, tensors = CONVERSIONS[kind](source, name)
    source.check_all_taken()
    return kind, model, tensors


def _kind(source: Source) -> str:
    kind = source.config.values.get("model_type")
    if kind is None and "d_model" in source.config and "n_layer" in source.config:
        return "state-spaces"
    if kind == MODEL_TYPE:
        raise FolderError(
            f"{source.config.origin}: model_type={MODEL_TYPE} is a model folder of this project already; train on from "
            "it with experiment=upcycle train.initial=FOLDER, under any memory"
        )
    if not isinstance(kind, str) or kind not in CONVERSIONS:
        known = ", ".join(sorted(CONVERSIONS))
        raise FolderError(f"{source.config.origin}: model_type={str(kind)[:40]} is not one that is known: {known}")
    return kind


CONVERSIONS: dict[str, Callable[[Source, str], Converted]] = {
    "mamba2": mamba2,
    "state-spaces": state_spaces,
    "gated_deltanet": gated_deltanet,
    "qwen3_next": qwen3_next,
}
"""What can be imported, by model_type of its config.json."""
