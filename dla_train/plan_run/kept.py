"""A list of tensors that forward keeps for backward, by name."""
from __future__ import annotations
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """Tensors of one stage that live until its backward."""

    name: str
    bytes: int
