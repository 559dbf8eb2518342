"""One token of a backbone, on any number of states: the definition the chunk operators are tested against."""

from __future__ import annotations

from torch import Tensor


def transition(states: Tensor, k: Tensor, log_decay: Tensor, erase: Tensor | None) -> Tensor:
    """e^g (I - erase k k^T) S for states [..., S, K, V], k [..., K], log_decay, erase [...] (docs/dla.md, 1)."""
    decay = log_decay.exp()[..., None, None, None]
    if erase is None:
        return decay * states
    key = k[..., None, :, None]
    removed = (key * states).sum(-2, keepdim=True)
    return decay * (states - erase[..., None, None, None] * key * removed)


def write_of(k: Tensor, v: Tensor, write: Tensor | None) -> Tensor:
    """write k v^T: k [..., K], v [..., V] -> [..., K, V]."""
    outer = k[..., :, None] * v[..., None, :]
    return outer if write is None else write[..., None, None] * outer
