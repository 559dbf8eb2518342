"""How every logical tensor of the model is divided over the tensor-parallel ranks: one table, read by construction,
initialisation, checkpoints and tests alike.

A divided tensor lies in equal parts along one dimension, in rank order, by heads, key heads, MLP channels or vocabulary
rows; weights are never fused, so a part is a contiguous run of whole heads. Everything else is whole on every rank. Of
that, some sees only its rank's heads or tokens, and its gradient is a part of a sum: `PARTIAL` names it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_train.config import ModelConfig
from dla_train.layout_rules import refuse, tensor_problems
from dla_train.parallel.axes import Axis
from dla_train.parallel.vocab import padded_vocab


@dataclass(frozen=True)
class Section:
    """Tensors of one pattern: what a part is a run of, and the dimension it lies along."""

    pattern: str
    unit: str
    """`heads`, `key_heads`, `inner` (MLP channels) or `vocab`."""
    dim: int = 0
    backbone: str = ""
    """Of this backbone only."""


SECTIONS = (
    Section("embedding.weight", "vocab"),
    Section("head.weight", "vocab"),
    Section("*.mlp.gate.weight", "inner"),
    Section("*.mlp.up.weight", "inner"),
    Section("*.mlp.down.weight", "inner", dim=1),
    Section("*.mixer.q.weight", "heads"),
    Section("*.mixer.k.weight", "key_heads"),
    Section("*.mixer.v.weight", "key_heads"),
    Section("*.mixer.out.weight", "heads", dim=1),
    *(Section(f"*.backbone.{name}.weight", "heads") for name in ("v", "a", "b", "gate", "z", "x", "dt")),
    *(Section(f"*.backbone.{name}.weight", "key_heads") for name in ("q", "k", "B", "C")),
    *(Section(f"*.backbone.conv.{name}", "heads") for name in ("v", "x", "bias_v", "bias_x")),
    *(Section(f"*.backbone.conv.{name}", "key_heads") for name in ("q", "k", "B", "C")),
    *(Section(f"*.backbone.conv.bias_{name}", "key_heads") for name in ("q", "k", "B", "C")),
    Section("*.backbone.decay.*", "heads"),
    Section("*.backbone.norm.*", "heads", backbone="mamba2"),
    Section("*.backbone.out.weight", "heads", dim=1),
    Section("*.reader.slots.*", "heads"),
    Section("*.reader.tau.*", "heads"),
    Section("*.reader.routing.gain", "heads"),
    Section("*.reader.routing.log_sharpness", "heads"),
    Section("*.reader.routing.*.weight", "key_heads"),
    Section("*.reader.routing.conv.*", "key_heads"),
    Section("*.mixer.statistics", "heads"),
)
"""The first match wins; what no pattern covers is whole on every rank."""

OF_HEADS = ("*.backbone.norm.weight",)
"""Whole on every rank but used by its own heads only."""
OF_TIME = ("*.mixer_norm.weight", "*.mlp_norm.weight", "final_norm.weight")
"""Whole on every rank but used on its own tokens only, where the residual stream is divided along time."""


def section_of(name: str, model: ModelConfig) -> Section | None:
    """The section that divides tensor `name` of the whole model, or None where every rank has all of it.

    A single key head serves all heads and stays whole.
    """
    for section in SECTIONS:
        if fnmatch.fnmatchcase(name, section.pattern) and section.backbone in ("", model.backbone):
            return None if section.unit == "key_heads" and model.num_key_heads == 1 else section
    return None


def is_partial(name: str, model: ModelConfig, *, sequence: bool) -> bool:
    """Whether a whole tensor's gradient on one rank is a part of the sum over the tensor-parallel ranks."""
    if section_of(name, model) is not None:
        return False
    by_key_head = any(fnmatch.fnmatchcase(name, s.pattern) for s in SECTIONS if s.unit == "key_heads")
    by_time = sequence and any(fnmatch.fnmatchcase(name, pattern) for pattern in OF_TIME)
    return by_key_head or by_time or any(fnmatch.fnmatchcase(name, pattern) for pattern in OF_HEADS)


def local_model(model: ModelConfig, ranks: int) -> ModelConfig:
    """The part of `model` one of `ranks` ranks has: its heads, MLP channels and (padded) vocabulary rows.

    Raises ConfigError where they do not divide, with the numbers of ranks that would.
    """
    if ranks == 1:
        return model
    refuse(tensor_problems(model, ranks).values())
    return dataclasses.replace(
        model,
        num_heads=model.num_heads // ranks,
        num_key_heads=max(model.num_key_heads // ranks, 1),
        mlp_width=model.mlp_width // ranks,
        vocab_size=padded_vocab(model.vocab_size, ranks) // ranks,
    )


def whole_shape(name: str, part: torch.Size | tuple[int, ...], model: ModelConfig, ranks: int) -> tuple[int, ...]:
    """Shape of the whole tensor of which a rank has `part`; without the padding of the vocabulary."""
    section = section_of(name, model)
    if section is None or ranks == 1:
        return tuple(part)
    shape = list(part)
    shape[section.dim] = model.vocab_size if section.unit == "vocab" else shape[section.dim] * ranks
    return tuple(shape)


def part_of(name: str, whole: Tensor, model: ModelConfig, axis: Axis) -> Tensor:
    """This rank's part of the whole tensor `name`; rows that pad the vocabulary are zero."""
    section = section_of(name, model)
    if section is None or axis.size == 1:
        return whole
    if section.unit == "vocab":
        whole = F.pad(whole, (0, 0, 0, padded_vocab(model.vocab_size, axis.size) - whole.shape[0]))
    return whole.chunk(axis.size, dim=section.dim)[axis.rank]


def whole_of(name: str, part: Tensor, model: ModelConfig, axis: Axis) -> Tensor:
    """The whole tensor `name` from every rank's part (collective), without the padding of the vocabulary."""
    section = section_of(name, model)
    if section is None or axis.size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(axis.size)]
    torch.distributed.all_gather(parts, part.contiguous(), group=axis.group)
    whole = torch.cat(parts, dim=section.dim)
    return whole[: model.vocab_size] if section.unit == "vocab" else whole


def sum_partial_gradients(module: nn.Module, model: ModelConfig, axis: Axis, *, sequence: bool) -> None:
    """Have backward sum the gradients of partial parameters over the tensor-parallel ranks, as they are made.

    Marks divided parameters as `tensor_model_parallel`, which DeepSpeed reads for its norm.
    """
    if axis.size == 1:
        return
    for name, parameter in module.named_parameters():
        if section_of(name, model) is not None:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        elif is_partial(name, model, sequence=sequence):
            parameter.register_hook(lambda gradient: _sum(gradient, axis))


def _sum(gradient: Tensor, axis: Axis) -> Tensor:
    total = gradient.clone()
    torch.distributed.all_reduce(total, group=axis.group)
    return total
