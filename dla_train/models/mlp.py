"""SwiGLU feed-forward layer (Shazeer 2020): down(silu(gate(x)) * up(x)), three matrices, no bias."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dla_train.models.linear import Linear


class SwiGLU(nn.Module):
    """Gated MLP of inner width `inner`; gate and up are separate logical weights."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = Linear(width, inner)
        self.up = Linear(width, inner)
        self.down = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D] in x's dtype."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
