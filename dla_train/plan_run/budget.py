"""Memory of one rank by kind, and how much of it is held at once.

A few moments compete for the peak: the loss, when everything that forward keeps is alive beside the logits; the
backward pass of a layer, when its recomputed activations and the workspace of mixing are; the optimizer's step, when
no activations are left but the engine may hold gradients twice; and an evaluation, which copies the weights. The total
counts the largest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dla_train.config import Config
from dla_train.models.cost import cache_bytes, parameter_count
from dla_train.plan_run.activations import kept_by_head, kept_by_layer, loss_bytes, plans_bytes, workspace_bytes
from dla_train.plan_run.layout import Layout
from dla_train.plan_run.shape import Kept, LayerShape
from dla_train.plan_run.states import FLOAT_BYTES, States, Weights, states


@dataclass(frozen=True)
class Budget:
    """Bytes on one rank."""

    states: States
    """What stays from step to step."""
    activations: int
    """What forward keeps of all layers and the head; with recomputation, the blocks' inputs and the head's."""
    plans: int
    """Memory plans of all layers, or attention's mask, which recomputation reads back; without it, in `activations`."""
    recomputed: int
    """Activations of the one layer that is computed again."""
    workspace: int
    """What the operations of a layer hold while they run, beside what is kept."""
    loss: int
    """Logits, their gradient, and what the loss keeps."""
    carried: int
    """Merge caches between segments of a row: those that the last one left and those that this one leaves."""
    evaluation: int
    """The whole float32 copy that published tasks are asked of, and its logits; at a time without activations."""
    layer: tuple[Kept, ...]
    """What one layer keeps without recomputation, by part."""
    cache_bytes: int
    """Decode caches of all layers for one sequence; no part of the total."""

    @property
    def total(self) -> int:
        """Most that is held at once."""
        s = self.states
        backward = s.gradients + s.buffers + self.activations + self.plans + self.carried
        backward += max(self.loss, self.recomputed + self.workspace)
        return s.weights + s.optimizer + max(backward, s.step, s.gradients + self.evaluation)


def budget(layout: Layout, shape: LayerShape, weights: Weights, config: Config) -> Budget:
    """Of a rank with these weights."""
    layers = shape.model.num_layers
    layer = kept_by_layer(shape)
    head = sum(part.bytes for part in kept_by_head(shape))
    kept, plans, again = sum(part.bytes for part in layer), 0, 0
    if layout.recompute:
        plans = plans_bytes(shape)
        again = sum(part.bytes for part in layer if not part.of_plan)
        kept = shape.residual_tokens * shape.compute_bytes * shape.model.width
    return Budget(
        states=states(layout, weights),
        activations=layers * kept + head,
        plans=plans,
        recomputed=again,
        workspace=workspace_bytes(shape),
        loss=loss_bytes(shape, config.optim.z_loss > 0, divided=layout.tensor > 1),
        carried=_carried(shape),
        evaluation=_evaluation(config, shape),
        layer=tuple(layer),
        cache_bytes=cache_bytes(shape.model, shape.memory, 1, shape.context, compute_bytes=shape.compute_bytes),
    )


def _evaluation(config: Config, shape: LayerShape) -> int:
    if not config.evaluation.tasks:
        return 0
    logits = shape.compute_bytes * config.evaluation.batch_tokens * config.model.vocab_size
    return FLOAT_BYTES * parameter_count(config.model, config.memory) + logits


def _carried(shape: LayerShape) -> int:
    """Of all layers, for the micro-batch's rows and the heads inside a mixer."""
    if shape.segments == 1:
        return 0
    inside = dataclasses.replace(shape.model, num_heads=shape.heads, num_key_heads=shape.key_heads)
    return 2 * cache_bytes(inside, shape.memory, shape.rows, shape.context)
