"""One token of a backbone, on any number of states: the definition the chunk operators are tested against."""

from __future__ import annotations

from torch import Tensor


def transition(states: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor | None) -> Tensor:
    """e^g (I - beta k k^T) S for states [..., S, K, V], k [..., K], log_decay, beta [...] (docs/dla.md, 1)."""
    decay = log_decay.exp()[..., None, None, None]
    if beta is None:
        return decay * states
    key = k[..., None, :, None]
    removed = (key * states).sum(-2, keepdim=True)
    return decay * (states - beta[..., None, None, None] * key * removed)


def write_of(k: Tensor, v: Tensor, beta: Tensor | None) -> Tensor:
    """beta k v^T: k [..., K], v [..., V] -> [..., K, V]."""
    outer = k[..., :, None] * v[..., None, :]
    return outer if beta is None else beta[..., None, None] * outer
