"""One residual block: x + mixer(norm(x)), then x + mlp(norm(x)); and the one place where a mixer is chosen.

Under tensor parallelism mixer and MLP are built with this rank's heads and channels and know nothing of the others:
what enters them is whole, what leaves them is a part of a sum.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from dla_train.config import CHOICES, ConfigError, MemoryConfig, ModelConfig
from dla_train.models.attention import Attention
from dla_train.models.linear import RMSNorm
from dla_train.models.mixer import Cache, Documents, Mixer, PlanRecord
from dla_train.models.mlp import SwiGLU
from dla_train.models.recurrent import BACKBONES, RecurrentMixer
from dla_train.parallel.axes import Axes
from dla_train.parallel.regions import copy_to, gather_along, reduce_from, reduce_scatter_along
from dla_train.parallel.sections import local_model


def build_mixer(
    model: ModelConfig, memory: MemoryConfig, axes: Axes, *, compute_dtype: torch.dtype
) -> RecurrentMixer | Attention:
    """The mixer of `model.backbone` with the policy of `memory`. Raises ConfigError for an unknown backbone."""
    if model.backbone == "attention":
        return Attention(model, axes, compute_dtype=compute_dtype)
    if model.backbone in BACKBONES:
        return RecurrentMixer(model, memory, axes, compute_dtype=compute_dtype)
    raise ConfigError(f"model.backbone={model.backbone} is not one of {', '.join(CHOICES['model.backbone'])}")


class Block(nn.Module):
    """Pre-norm residual block; the MLP is left out where `mlp_width` is 0."""

    def __init__(self, model: ModelConfig, memory: MemoryConfig, axes: Axes, *, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.axes = axes
        self.mixer_norm = RMSNorm(model.width, model.norm_eps)
        self.mixer: Mixer = build_mixer(model, memory, axes, compute_dtype=compute_dtype)
        self.mlp_norm = RMSNorm(model.width, model.norm_eps) if model.mlp_width else None
        inner = local_model(model, axes.tensor.size).mlp_width
        self.mlp = SwiGLU(model.width, inner) if inner else None

    def forward(
        self,
        x: Tensor,
        documents: Documents,
        record: PlanRecord,
        gate_temperature: float,
        cache: Cache | None = None,
        return_cache: bool = False,
    ) -> tuple[Tensor, Cache | None]:
        """x [B, T, D] -> (x [B, T, D], the mixer's cache or None)."""
        mixed, after = self.mixer(
            enter(self.mixer_norm(x), self.axes),
            documents,
            record,
            gate_temperature=gate_temperature,
            cache=cache,
            return_cache=return_cache,
        )
        return self._feed_forward(x + leave(mixed, self.axes), self.axes), after

    def step(self, x: Tensor, cache: Cache) -> Tensor:
        """One token: x [B, D] -> [B, D]; `cache` is updated in place."""
        whole = dataclasses.replace(self.axes, sequence=False)  # one token is not divided along time
        mixed = self.mixer.step(self.mixer_norm(x), cache)
        return self._feed_forward(x + leave(mixed, whole), whole)

    def _feed_forward(self, x: Tensor, axes: Axes) -> Tensor:
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + leave(self.mlp(enter(self.mlp_norm(x), axes)), axes)


def enter(x: Tensor, axes: Axes) -> Tensor:
    """Into layers divided over the tensor axis: all of this context rank's tokens [B, T, D], the same on every rank."""
    return gather_along(x, axes.tensor, 1) if axes.sequence else copy_to(x, axes.tensor)


def leave(x: Tensor, axes: Axes) -> Tensor:
    """Out of them: the sum of the ranks' parts, divided along time where the residual stream is."""
    return reduce_scatter_along(x, axes.tensor, 1) if axes.sequence else reduce_from(x, axes.tensor)
