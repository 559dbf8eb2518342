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


def default_chunk_size(device: torch.device) -> int:
    """C where the caller names none: 64 fills a GPU's matrix units; 32 keeps a CPU's C x C tables in its cache."""
    return 64 if device.type == "cuda" else 32
