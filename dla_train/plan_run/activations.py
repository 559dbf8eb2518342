"""What autograd keeps of one layer from forward to backward, stage by stage, as this code does it."""

from __future__ import annotations

from dla_train.models.cost import layer_matrices
from dla_train.plan_run import memory_torch, memory_triton
from dla_train.plan_run.kept import Kept
from dla_train.plan_run.shape import FLOAT_BYTES, INDEX_BYTES, LayerShape


def kept_by_layer(shape: LayerShape) -> list[Kept]:
    """Everything one block keeps without recomputation."""
    mixer = _attention(shape) if shape.model.backbone == "attention" else _recurrent(shape)
    casts = layer_matrices(shape.model, shape.memory) * shape.compute_bytes if shape.cast_weights else 0
    norms = 2 if shape.model.mlp_width else 1
    return [
        Kept("residual norms", norms * _norm(shape)),
        Kept("inputs of projections", norms * shape.own_tokens * shape.compute_bytes * shape.model.width),
        *mixer,
        Kept("MLP", 4 * shape.own_tokens * shape.compute_bytes * shape.model.mlp_width),
        Kept("weights in the compute type", casts),
    ]


def _norm(shape: LayerShape) -> int:
    """An RMSNorm of the residual stream: its input, and unless fused a float32 copy, the result and the root."""
    width = shape.model.width
    each = shape.compute_bytes * width if shape.fused else FLOAT_BYTES * (2 * width + 1)
    return shape.residual_tokens * each


def _attention(shape: LayerShape) -> list[Kept]:
    heads, key_dim = shape.heads, shape.model.key_dim
    numbers = 2 * heads * key_dim + 2 * shape.key_size
    if shape.context_ranks > 1:
        numbers += heads * key_dim  # the output before and after its exchange
    angles = 2 * FLOAT_BYTES * key_dim  # cosines and sines, for queries and for keys
    mask = shape.rows * shape.context**2 * shape.compute_bytes if shape.packed else 0
    return [
        Kept("queries, keys, values and output", shape.tokens * shape.compute_bytes * numbers),
        Kept("rotary angles and softmax sums", shape.tokens * (angles + FLOAT_BYTES * heads)),
        Kept("attention mask", mask),
    ]


def _recurrent(shape: LayerShape) -> list[Kept]:
    operations = memory_triton if shape.backend == "triton" else memory_torch
    return [
        _conv(shape),
        _state_inputs(shape),
        _reads(shape),
        *operations.kept_by_memory(shape),
        _output(shape),
    ]


def _conv(shape: LayerShape) -> Kept:
    width, channels = shape.model.conv_width, shape.conv_size
    if not width or shape.fused:
        copies, masks = 1, 0
    else:
        copies, masks = width + 1, width - 1  # input, shifted inputs, and the sum before SiLU
    if not shape.erases or not shape.widened:
        copies += 1  # its output, read by the decay (mamba2) or in place (float32)
    return Kept("short convolution", shape.tokens * (copies * shape.compute_bytes * channels + masks))


def _state_inputs(shape: LayerShape) -> Kept:
    """Decay, write strength, and the normalisation of keys."""
    numbers = 2 * shape.heads
    if shape.erases:
        numbers += shape.heads + 4 * shape.key_heads + (2 * shape.key_size if shape.widened else 0)
    return Kept("decays and key norms", shape.tokens * FLOAT_BYTES * numbers)


def _reads(shape: LayerShape) -> Kept:
    """Read weights before they are gated: projection, levels, routing keys, score gradients."""
    tokens, heads = shape.tokens, shape.heads
    total = 0
    if shape.weighted:
        total += tokens * FLOAT_BYTES * heads * shape.read_outputs
    if shape.memory.policy == "log_linear":  # levels of slots, and the weights that are looked up by them
        total += tokens * (INDEX_BYTES * (shape.slots + 1) + FLOAT_BYTES * heads * shape.read_outputs)
    if shape.content:
        wide = shape.widened or shape.memory.routing == "projected"
        total += tokens * FLOAT_BYTES * (4 * shape.key_heads + (2 * shape.routing_size if wide else 0))
    if shape.gated:
        scores = shape.compute_bytes * heads * (shape.model.key_dim + shape.model.value_dim)
        total += tokens * (scores + (FLOAT_BYTES + 1) * heads)
    return Kept("learned read weights", total)


def _output(shape: LayerShape) -> Kept:
    """Gated norm and the output projection's input."""
    values, tokens = shape.value_size, shape.tokens
    if shape.erases and shape.fused:
        return Kept("output", tokens * 3 * shape.compute_bytes * values)
    copies = 5 + (1 if not shape.erases and shape.widened else 0)
    roots = 0 if shape.fused else shape.heads if shape.erases else shape.key_heads
    return Kept("output", tokens * (FLOAT_BYTES * (copies * values + roots) + shape.compute_bytes * values))
