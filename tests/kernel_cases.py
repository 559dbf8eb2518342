"""Inputs shared by the tests of operations."""

from dataclasses import dataclass

import torch
from torch import Tensor

BACKBONES = ("mamba2", "gated_deltanet")
POLICIES = ("single", "log_linear", "fixed", "dla")
PACKED = torch.tensor([0, 7, 45, 46, 60, 90])
"""cu_seqlens of two rows of 45 tokens: documents of 7, 38 | 1, 14, 30 tokens; 1 is shorter than the convolution."""


@dataclass
class Case:
    """One set of inputs, in the order of the operations."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None

    @property
    def keys(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.k, self.v, self.log_decay, self.beta

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        return self.q, *self.keys

    def map(self, function) -> "Case":
        return Case(*(None if x is None else function(x) for x in self.all))

    def rows(self, row: int, begin: int, end: int) -> "Case":
        """Tokens begin..end of one row, as a batch of one."""
        return self.map(lambda x: x[row : row + 1, begin:end])

    def tokens(self, begin: int, end: int) -> "Case":
        return self.map(lambda x: x[:, begin:end])


def make_case(
    backbone: str,
    *,
    batch: int = 2,
    tokens: int = 45,
    key_heads: int = 1,
    heads: int = 2,
    key_dim: int = 5,
    value_dim: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    decay: float = 0.3,
) -> Case:
    """Random inputs: unit keys, decays down to exp(-decay) a token, write strengths in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = normal(batch, tokens, key_heads, key_dim), normal(batch, tokens, key_heads, key_dim)
    k = k / k.norm(dim=-1, keepdim=True)
    # Neighbouring tokens resemble each other, as in text, so that drift takes its whole range.
    v = normal(batch, tokens, heads, value_dim)
    keep = torch.rand(batch, tokens, generator=generator) < 0.6
    for t in range(1, tokens):
        k[:, t] = torch.where(keep[:, t, None, None], k[:, t - 1] + 0.1 * k[:, t], k[:, t])
        v[:, t] = torch.where(keep[:, t, None, None], v[:, t - 1] + 0.1 * v[:, t], v[:, t])
    k = k / k.norm(dim=-1, keepdim=True)
    log_decay = -torch.rand(batch, tokens, heads, generator=generator, dtype=torch.float64) * decay
    beta = (
        torch.rand(batch, tokens, heads, generator=generator, dtype=torch.float64)
        if backbone == "gated_deltanet"
        else None
    )
    return Case(q, k, v, log_decay, beta).map(lambda x: x.to(dtype))


def capacity_of(policy: str) -> int:
    """A capacity small enough to force merges; log_linear needs 2**(capacity - 1) tokens."""
    return {"single": 1, "log_linear": 8}.get(policy, 4)


def plan_options(policy: str, drift: str = "token") -> dict:
    return {
        "tau": 0.9 if drift == "token" else 0.2,
        "capacity": capacity_of(policy),
        "policy": policy,
        "drift": drift,
        "interval": 5,
    }
