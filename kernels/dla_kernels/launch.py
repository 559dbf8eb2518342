"""Which implementation of an operation runs: the backend names, their choice and the error when one is not there.

`recurrent` is the token loop (the definition), `torch` the chunkwise form in PyTorch. `None` picks by device. A
backend that was asked for by name is used or refused, never replaced: a silent slow path costs a cluster a week.
"""

from __future__ import annotations

import torch

BACKENDS = ("torch", "recurrent")


class BackendError(ValueError):
    """An operation was asked to run on a backend that does not exist or cannot serve these inputs."""


def resolve_backend(backend: str | None) -> str:
    """Name of the implementation to run: `backend` itself, or the default where it is None."""
    if backend is None:
        return "torch"
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}; leave it None for the default")
    return backend


def default_chunk_size(device: torch.device, key_dim: int) -> int:
    """C where the caller names none: 64, which fills a GPU's matrix units; 32 for small keys on a CPU.

    A chunk costs about C^2 (K + V) in tables and S K V (C + K) in states: C near K balances them (measured on 2 cores,
    T = 2048: for K = 32 mixing is alike at both and planning 4 to 13% faster at 32; for K = 64 mixing is 14 to 20%
    faster at 64).
    """
    return 32 if device.type == "cpu" and key_dim <= 32 else 64
