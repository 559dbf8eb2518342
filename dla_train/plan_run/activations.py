"""What autograd keeps of one layer, the head and the loss from forward to backward, part by part.

Each number counts the tensors this code's operations save, with the copies that casts make: float32 arithmetic on
bfloat16 activations works on float32 copies, and those are what is kept.
"""

from __future__ import annotations

from types import ModuleType

from dla_train.models.cost import layer_matrices
from dla_train.plan_run import memory_torch, memory_triton
from dla_train.plan_run.shape import FLOAT_BYTES, INDEX_BYTES, Kept, LayerShape


def kept_by_layer(shape: LayerShape) -> list[Kept]:
    """Everything one block keeps without recomputation."""
    mixer = _attention(shape) if shape.model.backbone == "attention" else _recurrent(shape)
    casts = layer_matrices(shape.model, shape.memory) * shape.compute_bytes if shape.cast_weights else 0
    norms = 2 if shape.model.mlp_width else 1
    return [
        Kept("residual norms", norms * _norm(shape)),
        Kept("inputs of projections", norms * shape.own_tokens * shape.compute_bytes * shape.model.width),
        *mixer,
        Kept("MLP", _mlp(shape)),
        Kept("weights in the compute type", casts),
    ]


def kept_by_head(shape: LayerShape) -> list[Kept]:
    """What the embedding, the final norm and the head keep, without the logits."""
    width, size = shape.model.width, shape.compute_bytes
    indices = 2 if shape.fused else 1  # tokens, and their positions for the fused convolution
    return [
        Kept("final norm", _norm(shape) + shape.own_tokens * size * width),
        Kept("head in the compute type", shape.model.vocab_size * width * size if shape.cast_weights else 0),
        Kept("tokens and positions", indices * INDEX_BYTES * shape.tokens),
    ]


def loss_bytes(shape: LayerShape, z_loss: bool, *, divided: bool) -> int:
    """Most that the loss holds: over whole rows, float32 log-probabilities and two gradients of their size.

    Over divided rows (parallel/vocab.py): the logits, a float32 array of their size and their gradient.
    """
    rows, size = shape.model.vocab_size, shape.compute_bytes
    if divided:
        return shape.own_tokens * (rows * (2 * size + FLOAT_BYTES) + 2 * INDEX_BYTES)
    return shape.own_tokens * (rows * FLOAT_BYTES * (4 if z_loss else 3) + INDEX_BYTES)


def workspace_bytes(shape: LayerShape) -> int:
    """Most that the backward pass of a layer holds beyond what the layer keeps.

    Either at its start, in the MLP, or in mixing, when the MLP and the output stage have been let go and their
    gradients, of the residual stream, the output gate and what was read, are on their way. A shared embedding's
    gradient waits for its second half, until backward ends.
    """
    shared = FLOAT_BYTES * shape.model.vocab_size * shape.model.width if shape.model.tie_embeddings else 0
    mlp = 2 * shape.own_tokens * shape.compute_bytes * shape.model.mlp_width
    if shape.model.backbone == "attention":
        return shared + mlp
    passed = shape.own_tokens * (shape.compute_bytes * shape.model.width + FLOAT_BYTES * shape.value_size)
    passed += 2 * shape.tokens * FLOAT_BYTES * shape.value_size
    return shared + max(mlp, _operations(shape).workspace_bytes(shape) + passed - _mlp(shape) - _output(shape))


def plans_bytes(shape: LayerShape) -> int:
    """What all layers of a recomputed forward share or read back: memory plans, or one mask of documents."""
    if shape.model.backbone == "attention":
        return shape.rows * shape.context**2 if shape.packed else 0
    return shape.model.num_layers * _plan(shape)


def _plan(shape: LayerShape) -> int:
    """A memory plan: decisions a token and head, score gradients, and what mixing derived from it."""
    decisions = shape.tokens * (shape.heads * (FLOAT_BYTES + 1 + 2 * INDEX_BYTES) + INDEX_BYTES)
    carried = shape.rows * shape.heads * INDEX_BYTES * (2 * shape.slots + 1)
    return decisions + carried + _score_gradients(shape) + _operations(shape).plan_bytes(shape)


def _operations(shape: LayerShape) -> ModuleType:
    """The formulas of the memory operations' backend."""
    return memory_triton if shape.backend == "triton" else memory_torch


def _norm(shape: LayerShape) -> int:
    """An RMSNorm of the residual stream: its input, and unless fused a float32 copy, the result and the root."""
    width = shape.model.width
    each = shape.compute_bytes * width if shape.fused else FLOAT_BYTES * (2 * width + 1)
    return shape.residual_tokens * each


def _attention(shape: LayerShape) -> list[Kept]:
    numbers = 2 * shape.value_size + 2 * shape.key_size
    if shape.context_ranks > 1:
        numbers += shape.value_size  # the output before and after its exchange
    angles = 2 * shape.model.key_dim  # cosines and sines, for queries and for keys
    mask = shape.rows * shape.context**2 * shape.compute_bytes if shape.packed else 0
    return [
        Kept("queries, keys, values and output", shape.tokens * shape.compute_bytes * numbers),
        Kept("rotary angles and softmax sums", shape.tokens * FLOAT_BYTES * (angles + shape.heads)),
        Kept("attention mask", mask),
    ]


def _recurrent(shape: LayerShape) -> list[Kept]:
    return [
        Kept("short convolution", _conv(shape)),
        Kept("decays and key norms", _state_inputs(shape)),
        Kept("learned read weights", _reads(shape)),
        Kept("score gradients", _score_gradients(shape), of_plan=True),
        *_operations(shape).kept_by_memory(shape),
        Kept("output norm and projection", _output(shape)),
    ]


def _mlp(shape: LayerShape) -> int:
    """Gate before and after SiLU, what it gates, and the product."""
    return 4 * shape.own_tokens * shape.compute_bytes * shape.model.mlp_width


def _conv(shape: LayerShape) -> int:
    """The convolution's input; in PyTorch its shifted copies and the sum before SiLU too, with a bias always."""
    width, channels = shape.model.conv_width, shape.conv_size
    copies, masks = (1, 0) if shape.fused or not width else (width + 1, width - 1)
    if shape.fused and shape.model.conv_bias:
        copies += 1
    if not shape.erases or not shape.widened:
        copies += 1  # its output, which the decay reads (mamba2), or of which keys are a view (float32)
    return shape.tokens * (copies * shape.compute_bytes * channels + masks) + channels * width * shape.compute_bytes


def _state_inputs(shape: LayerShape) -> int:
    """Decay, write strength, and the normalisation of keys."""
    numbers = 2 * shape.heads
    if shape.erases:
        numbers += shape.heads + 4 * shape.key_heads + (2 * shape.key_size if shape.widened else 0)
    return shape.tokens * FLOAT_BYTES * numbers


def _reads(shape: LayerShape) -> int:
    """Read weights before they are combined: projection, levels, routing keys, gates."""
    tokens, heads = shape.tokens, shape.heads
    total = tokens * FLOAT_BYTES * heads * shape.memory.read_outputs
    if shape.memory.policy == "log_linear" and shape.memory.read_outputs:  # levels of slots, and weights by them
        total += tokens * (INDEX_BYTES * (shape.slots + 1) + FLOAT_BYTES * heads * shape.memory.read_outputs)
    if shape.memory.routes:
        wide = shape.widened or shape.memory.routing != "qk"
        total += tokens * FLOAT_BYTES * (4 * shape.key_heads + (2 * shape.routing_size if wide else 0))
        total += _routing_conv(shape)
    if shape.memory.gated:
        total += tokens * (FLOAT_BYTES + 1) * heads
    return total


def _routing_conv(shape: LayerShape) -> int:
    """The input of routing's convolution, which has no SiLU; in PyTorch its shifted copies too."""
    width, channels = shape.model.conv_width, 2 * shape.routing_size
    if shape.memory.routing != "convolved" or not width:
        return 0
    copies, masks = (1, 0) if shape.fused else (width, width - 1)
    return shape.tokens * (copies * shape.compute_bytes * channels + masks) + channels * width * shape.compute_bytes


def _score_gradients(shape: LayerShape) -> int:
    """Of every boundary's score with respect to its key and value, kept since planning."""
    numbers = shape.model.key_dim + shape.model.value_dim
    return shape.tokens * shape.compute_bytes * shape.heads * numbers if shape.memory.gated else 0


def _output(shape: LayerShape) -> int:
    """Gated norm and the output projection's input."""
    values, tokens = shape.value_size, shape.tokens
    if shape.erases and shape.fused:
        return tokens * 3 * shape.compute_bytes * values
    copies = 5 + (1 if not shape.erases and shape.widened else 0)
    roots = 0 if shape.fused else shape.heads if shape.erases else shape.key_heads
    return tokens * (FLOAT_BYTES * (copies * values + roots) + shape.compute_bytes * values)
