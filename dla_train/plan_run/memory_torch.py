"""What the memory operations in PyTorch keep for backward (dla_kernels: memory/, backbones/operators.py).

Per cell (a token of a head, in whole chunks), unless said otherwise. A matrix product keeps its operands, and copies
them first where heads-first views are not contiguous; padding makes them so, and float32 keys and values without
padding are views of what the backbone keeps anyway.
"""

from __future__ import annotations

from dla_train.plan_run.kept import Kept
from dla_train.plan_run.shape import FLOAT_BYTES, INDEX_BYTES, LayerShape


def kept_by_memory(shape: LayerShape) -> list[Kept]:
    """Read weights, operators and mixing."""
    return [
        *_slot_indices(shape),
        *(_affinity(shape) if shape.content else ()),
        *(_gates(shape) if shape.gated else ()),
        *_operators(shape),
        *_mixing(shape),
    ]


def plan_bytes(shape: LayerShape) -> int:
    """Slot indices that hang on a plan, beyond the plan itself."""
    size, slots = shape.chunk, shape.slots
    edges = shape.rows * shape.heads * (shape.chunks + 1)
    by_cell = INDEX_BYTES * (size + slots + 1) + size + 2 * slots  # ranks and ends; starts and reads of slots, as bytes
    by_edge = INDEX_BYTES * (2 * slots + 1)
    return shape.cells * by_cell + edges * by_edge + shape.cells // shape.heads * size


def _slot_indices(shape: LayerShape) -> list[Kept]:
    """Ranks of tokens and old slots, by which read weights are looked up; and which tokens a token sees."""
    sees = shape.cells // shape.heads * shape.chunk
    ranks = shape.cells * (INDEX_BYTES * (shape.chunk + shape.slots) + shape.slots) if shape.weighted else 0
    return [Kept("slot indices", sees + ranks)]


def _affinity(shape: LayerShape) -> list[Kept]:
    slots, size = shape.slots, shape.chunk
    dim = shape.routing_size // shape.key_heads
    copies = 2 if shape.padded else 3  # queries are copied for each of their two products
    products = copies * dim + slots * dim / size + slots + slots * slots / size
    means = FLOAT_BYTES * slots + slots  # token counts, and which are empty
    softmax = (FLOAT_BYTES + 1) * slots + FLOAT_BYTES * (slots + 1)
    return [
        Kept("affinity", round(shape.cells * (FLOAT_BYTES * products + means))),
        Kept("content weights", shape.tokens * shape.heads * softmax),
    ]


def _gates(shape: LayerShape) -> list[Kept]:
    """The chain of gated weights keeps every link: two numbers a slot."""
    slots, heads = shape.slots, shape.tokens * shape.heads
    indices = shape.cells * INDEX_BYTES * (shape.chunk + slots)
    lookup = shape.rows * shape.heads * (INDEX_BYTES * (shape.chunks + 1) * slots + FLOAT_BYTES * (slots + 1))
    between = shape.cells * FLOAT_BYTES * (slots + 2)
    chain = FLOAT_BYTES * heads * (slots + 1 + 2 * slots - 3)
    return [Kept("gated weights", indices + lookup + between + chain)]


def _operators(shape: LayerShape) -> list[Kept]:
    size, key_dim, heads = shape.chunk, shape.model.key_dim, shape.heads
    tables, keys, scalars = 2, 1, 3  # q k^T and its decay; scaled queries; decays to the token and to the end
    tables += 1 if shape.frozen else 0  # ends of segments
    scalars += 3 if shape.frozen else 0
    if shape.erases:
        tables += 6 if not shape.frozen else 7  # the inverse and what it is made of, and A
        keys += 3 if not shape.frozen else 4  # erased, restored and decayed keys
        scalars += 1
    if not shape.padded:
        keys += 4 if shape.erases else 2  # operands, copied
    cells = FLOAT_BYTES * (tables * size + keys * key_dim + scalars)
    masks = shape.cells // heads * (size * (2 if shape.erases else 1) + 1)
    segments = shape.cells * (size + 1) if shape.frozen else 0
    return [
        Kept("chunk operators", shape.cells * cells + masks + segments),
        Kept("keys", _key_bytes(shape)),
    ]


def _key_bytes(shape: LayerShape) -> int:
    """Keys of every head in float32; without a copy, the backbone's own: of mamba2 they are a view of its convolution."""
    copied = shape.widened or shape.padded or shape.key_heads != shape.heads
    total = shape.cells * FLOAT_BYTES * shape.model.key_dim if copied else 0
    if shape.erases and not shape.widened:
        routed = 2 if shape.content and shape.memory.routing == "qk" else 0
        total += shape.tokens * FLOAT_BYTES * shape.key_size * max(routed, 0 if copied else 1)
    return total


def _mixing(shape: LayerShape) -> list[Kept]:
    size, slots, key_dim, value_dim = shape.chunk, shape.slots, shape.model.key_dim, shape.model.value_dim
    tables = 3 if shape.weighted else 2  # (the mixing matrix,) the weights of its tokens, and their product
    weights = 2 if shape.weighted else 1  # by rank, and of old slots
    transition = key_dim * key_dim / size if shape.erases else 1 / size
    values = 0 if shape.padded else value_dim
    if shape.widened or shape.padded or not shape.erases:
        values += value_dim
    cells = tables * size + weights * slots + 2 * key_dim + transition + values
    routes = slots * slots / size + slots
    return [
        Kept("mixing", round(shape.cells * FLOAT_BYTES * cells)),
        Kept("states at chunk starts", shape.chunks * shape.state_bytes),
        Kept("routes of slots and tokens", round(shape.cells * FLOAT_BYTES * routes)),
    ]
