"""One residual block: x + mixer(norm(x)), then x + mlp(norm(x)); and the one place where a mixer is chosen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dla_train.config import CHOICES, ConfigError, MemoryConfig, ModelConfig
from dla_train.models.attention import Attention
from dla_train.models.linear import RMSNorm
from dla_train.models.mixer import Cache, Documents, Mixer, PlanRecord
from dla_train.models.mlp import SwiGLU
from dla_train.models.recurrent import BACKBONES, RecurrentMixer


def build_mixer(model: ModelConfig, memory: MemoryConfig, *, compute_dtype: torch.dtype) -> RecurrentMixer | Attention:
    """The mixer of `model.backbone` with the policy of `memory`. Raises ConfigError for an unknown backbone."""
    if model.backbone == "attention":
        return Attention(model, compute_dtype=compute_dtype)
    if model.backbone in BACKBONES:
        return RecurrentMixer(model, memory, compute_dtype=compute_dtype)
    raise ConfigError(f"model.backbone={model.backbone} is not one of {', '.join(CHOICES['model.backbone'])}")


class Block(nn.Module):
    """Pre-norm residual block; the MLP is left out where `mlp_width` is 0."""

    def __init__(self, model: ModelConfig, memory: MemoryConfig, *, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(model.width, model.norm_eps)
        self.mixer: Mixer = build_mixer(model, memory, compute_dtype=compute_dtype)
        self.mlp_norm = RMSNorm(model.width, model.norm_eps) if model.mlp_width else None
        self.mlp = SwiGLU(model.width, model.mlp_width) if model.mlp_width else None

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
            self.mixer_norm(x),
            documents,
            record,
            gate_temperature=gate_temperature,
            cache=cache,
            return_cache=return_cache,
        )
        return self._feed_forward(x + mixed), after

    def step(self, x: Tensor, cache: Cache) -> Tensor:
        """One token: x [B, D] -> [B, D]; `cache` is updated in place."""
        return self._feed_forward(x + self.mixer.step(self.mixer_norm(x), cache))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x if self.mlp is None or self.mlp_norm is None else x + self.mlp(self.mlp_norm(x))
