"""Context parallelism inside a mixer: tokens are exchanged for heads and back (docs/parallelism.md).

Outside mixers a rank has a run of every row's tokens, inside all tokens of a part of the heads. Heads are independent
and a head's memory sees its whole row on one rank, so this is exact: no decision crosses a rank.
"""

from __future__ import annotations

from torch import Tensor

from dla_train.config import ConfigError
from dla_train.parallel.axes import Axes, Axis
from dla_train.parallel.regions import exchange, gather_along


def to_heads(x: Tensor, context: Axis) -> Tensor:
    """[B, T/ranks, heads, ...] -> [B, T, heads/ranks, ...]; a single head, which all share, goes to every rank."""
    if context.size == 1:
        return x
    if x.shape[2] == 1:
        return gather_along(x, context, 1)
    return exchange(x, context, split_dim=2, join_dim=1)


def to_time(x: Tensor, context: Axis) -> Tensor:
    """[B, T, heads/ranks, ...] -> [B, T/ranks, heads, ...]."""
    return exchange(x, context, split_dim=1, join_dim=2) if context.size > 1 else x


def own_time(x: Tensor, axes: Axes) -> Tensor:
    """This context rank's run of the tokens of whole rows [B, T, ...]. Raises ConfigError where T does not divide."""
    ranks = axes.context.size * (axes.tensor.size if axes.sequence else 1)
    if x.shape[1] % ranks:
        raise ConfigError(
            f"rows of {x.shape[1]} tokens are not divisible by the {ranks} ranks along time (parallel.context="
            f"{axes.context.size}, parallel.sequence={axes.sequence}); choose data.context_tokens a multiple of {ranks}"
        )
    return x.chunk(axes.context.size, dim=1)[axes.context.rank]
