"""Generators of the splits of an experiment: one for every (seed, split), no two with the same numbers.

torch seeds its generator on the CPU with the low 32 bits of a number, so a hash could give two streams one seed. Here
(seed, split) is counted through and mixed one to one within 32 bits, which cannot, and which keeps the streams of small
seeds from being those of a plain `manual_seed` of small numbers elsewhere.
"""

from __future__ import annotations

import torch

from dla_train.recall.tasks.errors import RecallError

SPLITS = ("train", "held_out", "tuning")
"""What is trained on; what is reported; what learning rates are chosen by."""
LARGEST_SEED = 2**32 // len(SPLITS) - 1
"""Seeds from 0 to this have streams of their own."""
_FACTOR, _SHIFT = 0x9E3779B1, 0x7F4A7C15  # the factor is odd, so multiplying by it modulo 2**32 is one to one


def stream(seed: int, split: str) -> torch.Generator:
    """A new generator at the beginning of its stream. Raises RecallError."""
    if split not in SPLITS:
        raise RecallError(f"split={split!r} is not one of the choices; choose from {', '.join(SPLITS)}")
    if not 0 <= seed <= LARGEST_SEED:
        raise RecallError(f"seed={seed} has no stream of its own; choose from 0 to {LARGEST_SEED}")
    number = seed * len(SPLITS) + SPLITS.index(split)
    return torch.Generator().manual_seed((number * _FACTOR + _SHIFT) % 2**32)
