"""What the memory operations in Triton keep for backward, and what they need while they run (dla_kernels: *_triton.py).

Per cell (a token of a head, in whole chunks), unless said otherwise. Operators take the compute type; states, weights
and decays are float32. States are swept a group of G chunks at a time, so that G + 1 edges are held and one state set a
further group is kept (docs/performance.md).
"""

from __future__ import annotations

import math

from dla_train.plan_run.kept import Kept
from dla_train.plan_run.shape import FLOAT_BYTES, LayerShape

GROUP_BYTES = 2**29
INDEX_BYTES = 4
"""Of the slot table."""


def kept_by_memory(shape: LayerShape) -> list[Kept]:
    """Read weights, operators and mixing."""
    token_heads = shape.tokens * shape.heads
    routing = 2 * shape.tokens * shape.routing_size * shape.compute_bytes
    weights = 1 + (1 if shape.gated else 0) + (1 if shape.content else 0)  # each stage's result, or affinity
    return [
        Kept("routing keys", routing if shape.content else 0),
        Kept("weights by rank", token_heads * FLOAT_BYTES * (weights * shape.slots + shape.gated)),
        Kept("slot table", plan_bytes(shape)),
        *_operators(shape),
        *_mixing(shape),
    ]


def plan_bytes(shape: LayerShape) -> int:
    """The slot table that hangs on a plan."""
    edges = shape.rows * shape.heads * (shape.chunks + 1)
    return INDEX_BYTES * (edges * (2 * shape.slots + 1) + shape.tokens * shape.heads + shape.tokens)


def group_chunks(shape: LayerShape) -> int:
    """G: chunks swept together."""
    return min(shape.chunks, max(GROUP_BYTES // max(shape.state_bytes, 1), math.isqrt(shape.chunks - 1) + 1))


def workspace_bytes(shape: LayerShape) -> int:
    """Most that the backward pass of mixing holds beside what is kept: states, adjoints and gradients."""
    edges = 2 * (group_chunks(shape) + 1) * shape.state_bytes
    return edges


def _operators(shape: LayerShape) -> list[Kept]:
    """Inputs and cumulative decays; with erasing the inverse too, which is not made again."""
    token_heads, frozen = shape.tokens * shape.heads, shape.frozen
    inputs = 2 * shape.tokens * shape.key_size * shape.compute_bytes + token_heads * (FLOAT_BYTES + frozen)
    inverse = shape.chunk if shape.erases else 0
    decays = shape.cells * FLOAT_BYTES * (2 + frozen + inverse) + FLOAT_BYTES * shape.cells // shape.chunk
    return [Kept("inputs of chunk operators", inputs + decays)]


def _mixing(shape: LayerShape) -> list[Kept]:
    keys = 2 + shape.frozen + (2 if shape.erases else 0)  # queries, keys at the end; what is erased and restored
    operators = shape.cells * shape.compute_bytes * (shape.chunk + keys * shape.model.key_dim)
    groups = -(-shape.chunks // group_chunks(shape))
    return [
        Kept("chunk operators", operators),
        Kept("values", shape.tokens * shape.compute_bytes * shape.value_size),
        Kept("states at group starts", groups * shape.state_bytes),
    ]
