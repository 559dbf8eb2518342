"""What lies between the tokens that matter: a few types of filler, and how the type changes from token to token.

Filler that repeats itself is what a memory of merged states should hold in one state; `random` and `drifting` take that
comfort away, for then the filler has boundaries of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

FILLERS = ("stable", "random", "drifting", "runs")
"""How the type changes:

- `stable`: constant between two needles, drawn anew after each;
- `random`: drawn anew at every filler token;
- `drifting`: before each filler token the type goes on to the next one, in a cycle, with probability 1 / run_tokens,
  whatever the needles do: stays are geometric, `run_tokens` filler tokens on average;
- `runs`: drawn anew after every `run_tokens` filler tokens, needles not counted.

A type drawn anew is that of before in one of `types` cases.
"""


def filler_types(kind: str, types: int, run_tokens: int, needle: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [B, C] in range(types): the filler's type at every position; at `needle` (bool [B, C]) it means nothing."""
    rows, tokens = needle.shape
    if kind == "random":
        return torch.randint(types, (rows, tokens), generator=generator)
    if kind == "drifting":
        first = torch.randint(types, (rows, 1), generator=generator)
        moved = torch.rand(rows, tokens, generator=generator) * run_tokens < 1
        return (first + (moved & ~needle).cumsum(dim=1)) % types
    # the index of a filler token's region: needles before it, or whole runs of filler before it
    region = needle.cumsum(dim=1) if kind == "stable" else ((~needle).cumsum(dim=1) - 1).clamp(min=0) // run_tokens
    return torch.randint(types, (rows, tokens + 1), generator=generator).gather(1, region)
