"""What the memory operations in Triton keep for backward, and what they need while they run (dla_kernels: *_triton.py).

Per cell (a token of a head, in whole chunks), unless said otherwise. Operators take the compute type; states, weights
and decays are float32. States are swept a group of G chunks at a time: a group's G + 1 edges are held while it is
swept, and of every group the states it began with are kept (docs/performance.md).
"""

from __future__ import annotations

import math

from dla_kernels.tuning import TUNING
from dla_train.plan_run.shape import GPU_ARCHITECTURE, Kept, LayerShape
from dla_train.plan_run.states import FLOAT_BYTES

GROUP_BYTES = 2**29
"""Of the edges of a group, unless sqrt(N) edges take more."""
PLANNER_BYTES = 2**29
"""Of the planner's tables, at most."""
TABLE_BYTES = 4
"""Of a number of the slot table."""


def kept_by_memory(shape: LayerShape) -> list[Kept]:
    """Read weights, operators and mixing."""
    stages = 1 + shape.memory.gated + shape.memory.routes  # the weights, what goes into their gates, and the affinity
    weights = shape.tokens * shape.heads * FLOAT_BYTES * (stages * shape.slots + shape.memory.gated)
    return [
        Kept("routing keys", 2 * shape.tokens * shape.compute_bytes * shape.routing_size),
        Kept("weights by rank", weights),
        Kept("slot table", plan_bytes(shape), of_plan=True),
        Kept("inputs of chunk operators", _operators(shape)),
        *_mixing(shape),
    ]


def plan_bytes(shape: LayerShape) -> int:
    """The slot table that hangs on a plan: starts and deaths of slots at chunk edges, deaths of tokens, documents."""
    return TABLE_BYTES * (shape.edges * (2 * shape.slots + 1) + shape.tokens * shape.heads + shape.tokens)


def workspace_bytes(shape: LayerShape) -> int:
    """What planning, or the backward pass of mixing, holds beside what is kept: the larger."""
    return max(_planning(shape), _mixing_backward(shape))


def group_chunks(shape: LayerShape) -> int:
    """G: chunks swept together."""
    return min(shape.chunks, max(GROUP_BYTES // max(shape.state_bytes, 1), math.isqrt(shape.chunks - 1) + 1))


def _planning(shape: LayerShape) -> int:
    """Tables of pairs of a span of chunks, and the float32 gradients of scores."""
    if shape.memory.policy != "dla":
        return 0
    size, key_dim, value_dim = shape.chunk, shape.model.key_dim, shape.model.value_dim
    pairs = (4 if shape.erases else 2) * size + (2 * key_dim if shape.erases else 0) + key_dim * value_dim / size
    gradients = key_dim + value_dim if shape.memory.gated else 0
    return min(PLANNER_BYTES, round(shape.cells * FLOAT_BYTES * pairs)) + shape.cells * FLOAT_BYTES * gradients


def _mixing_backward(shape: LayerShape) -> int:
    """States and adjoints of a group, gradients of all it reads, and those of slot weights once a block of K."""
    edges = 2 * (group_chunks(shape) + 1) * shape.state_bytes
    blocks = -(-shape.model.key_dim // TUNING["mix_read_backward"][GPU_ARCHITECTURE]["BK"])
    numbers = (blocks + 3) * shape.slots + shape.model.value_dim
    return edges + _operator_bytes(shape) + shape.cells * FLOAT_BYTES * numbers


def _operators(shape: LayerShape) -> int:
    """Inputs and cumulative decays; with erasing the inverse too, which is not made again."""
    token_heads, frozen = shape.tokens * shape.heads, shape.frozen
    inputs = 2 * shape.tokens * shape.key_size * shape.compute_bytes + token_heads * (FLOAT_BYTES + frozen)
    inverse = shape.chunk if shape.erases else 0
    return inputs + shape.cells * FLOAT_BYTES * (2 + frozen + inverse) + FLOAT_BYTES * shape.cells // shape.chunk


def _operator_bytes(shape: LayerShape) -> int:
    keys = 2 + shape.frozen + (2 if shape.erases else 0)  # queries, keys at the end; what is erased and restored
    return shape.cells * shape.compute_bytes * (shape.chunk + keys * shape.model.key_dim)


def _mixing(shape: LayerShape) -> list[Kept]:
    groups = -(-shape.chunks // group_chunks(shape))
    return [
        Kept("chunk operators", _operator_bytes(shape)),
        Kept("values", shape.tokens * shape.compute_bytes * shape.value_size),
        Kept("states at group starts", groups * shape.state_bytes),
    ]
