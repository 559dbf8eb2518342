"""What the memory operations in PyTorch keep for backward (dla_kernels: memory/, backbones/operators.py).

Per cell (a token of a head, in whole chunks), unless said otherwise. A matrix product keeps its operands, and copies
them first where heads-first views are not contiguous; padding makes them so, and float32 keys and values without
padding are views of what the backbone keeps anyway.
"""

from __future__ import annotations

from dla_train.plan_run.shape import INDEX_BYTES, Kept, LayerShape
from dla_train.plan_run.states import FLOAT_BYTES


def kept_by_memory(shape: LayerShape) -> list[Kept]:
    """Read weights, operators and mixing."""
    return [
        Kept("slot indices", _slot_indices(shape), of_plan=True),
        *(_affinity(shape) if shape.memory.routes else ()),
        *([Kept("gated weights", _gates(shape))] if shape.memory.gated else ()),
        Kept("chunk operators", _operators(shape)),
        Kept("keys", _keys(shape)),
        *_mixing(shape),
    ]


def plan_bytes(shape: LayerShape) -> int:
    """Slot indices that hang on a plan: of ranks, starts, reads and ends, of tokens and of slots."""
    size, slots = shape.chunk, shape.slots
    by_cell = INDEX_BYTES * (size + slots + 1) + size + 2 * slots
    by_edge = INDEX_BYTES * (2 * slots + 1)
    return shape.cells * by_cell + shape.edges * by_edge + shape.cells // shape.heads * size


def workspace_bytes(shape: LayerShape) -> int:
    """What the backward pass of mixing adds: gradients of all it reads, and six sets of states and adjoints.

    Queries, keys and their gradients are spread over slots for one chunk, C numbers where a state has V.
    """
    sets = 6 + 3 * shape.chunk / shape.model.value_dim
    return round(shape.cells * FLOAT_BYTES * _passed_on(shape) + sets * shape.state_bytes)


def _slot_indices(shape: LayerShape) -> int:
    """Ranks of tokens and old slots, by which read weights are looked up; and which tokens a token sees."""
    sees = shape.cells // shape.heads * shape.chunk
    ranks = INDEX_BYTES * (shape.chunk + shape.slots) + shape.slots
    return sees + (shape.cells * ranks if shape.weighted else 0)


def _affinity(shape: LayerShape) -> list[Kept]:
    slots, size, dim = shape.slots, shape.chunk, shape.routing_size // shape.key_heads
    copies = 2 if shape.padded else 3  # queries are copied for each of their two products
    products = copies * dim + slots * dim / size + slots + slots * slots / size
    means = FLOAT_BYTES * slots + slots  # token counts, and which are empty
    softmax = (FLOAT_BYTES + 1) * slots + FLOAT_BYTES * (slots + 1)
    return [
        Kept("affinity", round(shape.cells * (FLOAT_BYTES * products + means))),
        Kept("content weights", shape.tokens * shape.heads * softmax),
    ]


def _gates(shape: LayerShape) -> int:
    """Weights by rank pass a chain of gates, which keeps its every link: two numbers a slot."""
    slots, token_heads = shape.slots, shape.tokens * shape.heads
    indices = shape.cells * INDEX_BYTES * (shape.chunk + slots)
    lookup = shape.edges * INDEX_BYTES * slots + shape.rows * shape.heads * FLOAT_BYTES * (slots + shape.context + 1)
    between = shape.cells * FLOAT_BYTES * (slots + 2)
    chain = token_heads * FLOAT_BYTES * (slots + 2 * slots - 3)
    return indices + lookup + between + chain


def _operators(shape: LayerShape) -> int:
    tables, keys, scalars = 2, 1, 3  # q k^T and its decay; scaled queries; decays to the token and to the end
    if shape.frozen:  # ends of segments
        tables, scalars = tables + 1, scalars + 3
    if shape.erases:  # the inverse and what it is made of, and A; erased, restored and decayed keys
        tables, keys, scalars = tables + (7 if shape.frozen else 6), keys + (4 if shape.frozen else 3), scalars + 1
    if not shape.padded:  # operands, copied
        keys += 4 if shape.erases else 2
    cells = FLOAT_BYTES * (tables * shape.chunk + keys * shape.model.key_dim + scalars)
    segments = shape.chunk + 1 if shape.frozen else 0
    masks = shape.cells // shape.heads * (shape.chunk * (2 if shape.erases else 1) + 1)
    return shape.cells * (cells + segments) + masks


def _keys(shape: LayerShape) -> int:
    """Keys of every head in float32; without a copy the backbone's own, which mamba2's convolution keeps."""
    copied = shape.widened or shape.padded or shape.key_heads != shape.heads
    total = shape.cells * FLOAT_BYTES * shape.model.key_dim if copied else 0
    if shape.erases and not shape.widened:
        routed = shape.memory.routes and shape.memory.routing == "qk"
        own = 2 if routed else 0 if copied else 1
        total += shape.tokens * FLOAT_BYTES * shape.key_size * own
    return total


def _mixing(shape: LayerShape) -> list[Kept]:
    slots, value_dim = shape.slots, shape.model.value_dim
    tables = 3 if shape.weighted else 2  # (the mixing matrix,) the weights of its tokens, and their product
    by_rank = slots if shape.weighted else 0
    copied = 0 if shape.padded else value_dim
    values = value_dim if shape.widened or shape.padded or not shape.erases else 0
    cells = tables * shape.chunk + by_rank + copied + values + _passed_on(shape) - value_dim
    routes = slots * slots / shape.chunk + slots
    return [
        Kept("mixing", round(shape.cells * FLOAT_BYTES * cells)),
        Kept("states at chunk starts", shape.chunks * shape.state_bytes),
        Kept("routes of slots and tokens", round(shape.cells * FLOAT_BYTES * routes)),
    ]


def _passed_on(shape: LayerShape) -> float:
    """Numbers a cell that the pass over chunks reads: queries, keys, values, weights of old slots, transitions."""
    key_dim = shape.model.key_dim
    transition = key_dim * key_dim / shape.chunk if shape.erases else 1 / shape.chunk
    return 2 * key_dim + shape.model.value_dim + shape.slots + transition
