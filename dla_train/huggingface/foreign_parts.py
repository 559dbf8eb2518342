"""What several foreign layouts have in common: embeddings, convolutions, decays, MLPs, as our logical tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from dla_train.config import ModelConfig
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.foreign import Settings, Source

Converted = tuple[ModelConfig, dict[str, Tensor]]
"""Our model, and its backbone's tensors under logical names."""
SILU = ("silu", "swish")
"""Names of the one activation our backbones have."""


def check_groups(config: Settings, model: ModelConfig) -> None:
    """Raises FolderError where heads do not divide into groups."""
    if model.num_heads % model.num_key_heads:
        raise FolderError(
            f"{config.origin}: {model.num_heads} heads do not divide into {model.num_key_heads} groups; mend the file"
        )


def embeddings(source: Source, model: ModelConfig, embedding: str, norm: str) -> dict[str, Tensor]:
    """Embedding, final norm and head. A tied model may store its matrix twice, alike."""
    shape = (model.vocab_size, model.width)
    tensors = {"embedding.weight": source.take(embedding, *shape), "final_norm.weight": source.take(norm, model.width)}
    if not model.tie_embeddings:
        tensors["head.weight"] = source.take("lm_head.weight", *shape)
    elif "lm_head.weight" in source and not torch.equal(
        source.take("lm_head.weight", *shape), tensors["embedding.weight"]
    ):
        raise FolderError(
            f"{source.folder}: lm_head.weight differs from {embedding}, and config.json says they are tied"
        )
    return tensors


def convolution(source: Source, there: str, ours: str, sizes: dict[str, int], model: ModelConfig) -> dict[str, Tensor]:
    """Taps [channels, 1, W] and biases of one convolution over the named projections."""
    channels = sum(sizes.values())
    taps = source.take(f"{there}.weight", channels, 1, model.conv_width)[:, 0].split(list(sizes.values()))
    tensors = {f"{ours}.conv.{name}": part for name, part in zip(sizes, taps, strict=True)}
    if model.conv_bias:
        biases = source.take(f"{there}.bias", channels).split(list(sizes.values()))
        tensors |= {f"{ours}.conv.bias_{name}": part for name, part in zip(sizes, biases, strict=True)}
    return tensors


def decay(source: Source, there: str, ours: str, heads: int) -> dict[str, Tensor]:
    """A_log and dt_bias of every head."""
    return {f"{ours}.decay.{name}": source.take(f"{there}.{name}", heads) for name in ("A_log", "dt_bias")}


def mlp(source: Source, there: str, here: str, model: ModelConfig) -> dict[str, Tensor]:
    """The three matrices of a SwiGLU."""
    shapes = {
        "gate": (model.mlp_width, model.width),
        "up": (model.mlp_width, model.width),
        "down": (model.width, model.mlp_width),
    }
    return {
        f"{here}.mlp.{name}.weight": source.take(f"{there}.mlp.{name}_proj.weight", *shape)
        for name, shape in shapes.items()
    }
