"""Bytes that one rank sends in an optimizer step, by axis.

Ring algorithms over r ranks: a gather of n bytes (its result), a scattered sum of n bytes and an exchange of n bytes
send (r - 1) / r n each, a sum that every rank gets twice that. Left out, since they are small: sums of squares in a
norm that spans ranks, what a step counts, and vectors' float32 values beside bfloat16 weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from dla_train.config import Config
from dla_train.models.cost import routing_dim
from dla_train.plan_run.layout import Layout
from dla_train.plan_run.shape import LayerShape
from dla_train.plan_run.states import FLOAT_BYTES, weight_bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one rank in a step."""

    tensor: int
    """Sums of activations over heads and channels; with sequence parallelism, gathers and scattered sums of the same
    volume."""
    context: int
    """Exchanges of tokens for heads and back."""
    data: int
    """Sums of gradients over data and context ranks; gathers of weights that ZeRO divides."""

    @property
    def total(self) -> int:
        """All axes."""
        return self.tensor + self.context + self.data


def traffic(config: Config, layout: Layout, shape: LayerShape, weights: int) -> Traffic:
    """Of a rank with `weights` weights."""
    steps = layout.backward_passes(config)
    return Traffic(
        tensor=steps * _tensor(layout, shape),
        context=steps * config.model.num_layers * _context(layout, shape),
        data=_data(layout, weights, steps),
    )


def _tensor(layout: Layout, shape: LayerShape) -> int:
    """Of a micro-batch: in and out of every mixer and MLP, of the embedding and the head, forward and backward."""
    once = 2 * _share(layout.tensor) * shape.own_tokens * shape.model.width * shape.compute_bytes
    parts = 2 if shape.model.mlp_width else 1
    layer = 2.0 * parts  # one sum forward, one backward
    if layout.recompute:
        # The last sum of a block is not made again: nothing behind it is needed. The gather before the MLP is.
        layer += parts - 1 + (0.5 if layout.sequence else 0)
    of_loss = 2 * _share(layout.tensor) * shape.own_tokens * 3 * FLOAT_BYTES  # a token's largest logit, sum and score
    of_weights = 2 * _share(layout.tensor) * FLOAT_BYTES * _partial_gradients(layout, shape)
    return round(once * (shape.model.num_layers * layer + 2) + of_loss + of_weights)


def _partial_gradients(layout: Layout, shape: LayerShape) -> int:
    """Weights that every tensor rank has whole but uses for its own heads or tokens (parallel/sections.py)."""
    model = shape.model
    norms = (2 if model.mlp_width else 1) * model.width if layout.sequence else 0
    keys = 2 * model.key_dim * (model.width + model.conv_width + model.conv_bias)
    taps = model.conv_width if shape.memory.routing == "convolved" else 0
    keys += 2 * _routing(shape) * (model.width + taps)
    keys = keys if shape.shared_key_head else 0
    return model.num_layers * (norms + keys) + (model.width if layout.sequence else 0)


def _context(layout: Layout, shape: LayerShape) -> int:
    """Of one layer and micro-batch: what a mixer needs of all tokens, and what it gives back."""
    if layout.context == 1:
        return 0
    passes = 3 if layout.recompute else 2
    return round(passes * shape.own_tokens * _exchanged(shape, layout.context))


def _exchanged(shape: LayerShape, ranks: int) -> float:
    """Bytes a token, one way round. A single key head is gathered by every rank instead of exchanged."""
    model, size = shape.model, shape.compute_bytes
    share, heads = _share(ranks), model.num_heads
    of_keys = ranks - 1 if model.num_key_heads == 1 else share * model.num_key_heads
    values = heads * model.value_dim
    if model.backbone == "attention":
        return size * (2 * share * values + 2 * of_keys * model.key_dim)
    per_head = 2 if shape.erases else 1  # decay and write strength
    back = 1 if shape.erases else 2  # what was read, and what mamba2's skip connection adds
    numbers = share * ((1 + back) * values + per_head * heads) + 2 * of_keys * model.key_dim
    numbers += 2 * of_keys * _routing(shape)
    weights = share * heads * shape.memory.read_outputs
    return size * numbers + FLOAT_BYTES * weights


def _routing(shape: LayerShape) -> int:
    """Numbers of a key head's routing projection; 0 where there is none of its own."""
    return 0 if shape.memory.routing == "qk" else routing_dim(shape.model, shape.memory)


def _data(layout: Layout, weights: int, steps: int) -> int:
    """Of a step. Gradients travel in float32, weights as they are stored.

    Every rank gets whole sums, of which stages 1 and 2 then use a part; stage 3 scatters them. From stage 2 on they are
    made after every micro-batch, and stage 3 gathers weights for every forward and every backward pass.
    """
    sums = {0: 2, 1: 2, 2: 2 * steps, 3: steps}[layout.zero_stage]
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * steps}[layout.zero_stage]
    return round(_share(layout.shards) * weights * (sums * FLOAT_BYTES + gathers * weight_bytes(layout)))


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks
