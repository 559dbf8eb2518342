"""Bytes of weights, gradients, optimizer states and the engine's buffers on one rank, by engine and ZeRO stage.

Of W weights on a rank and R ranks with the same weights (data x context): the local engine keeps float32 weights,
gradients and two moments whole (16 W). ZeRO divides the optimizer's values and moments (12 W / R) from stage 1 on,
gradients (4 W / R) from stage 2 on, weights at stage 3; gradients are accumulated and summed in float32 whatever the
weights are stored in. What DeepSpeed holds besides was read in its code and is held to what two ranks really hold
(tests/train/test_plan_engines.py). Left out, since they are small: the float32 values of vectors beside bfloat16
weights (models/linear.py, `exact`), and padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from dla_train.engine import zero_settings
from dla_train.plan_run.layout import Layout

FLOAT_BYTES = 4
"""Of gradients, moments, decays, norms, read weights and loss, whatever the compute type."""
DOUBLE_BYTES = 8
MOMENTS = 2
"""AdamW's, float32."""
UNBUCKETED_ELEMENTS = 5 * 10**8
"""Gradients that DeepSpeed copies and sums at once where no bucket size is taken: stage 0, stage 1 in bfloat16."""
STEPPED_ELEMENTS = 10**9
"""Weights that stage 3 updates at once (DeepSpeed's sub_group_size)."""


@dataclass(frozen=True)
class Weights:
    """How many weights a rank has, and how they get their gradients."""

    all: int
    largest: int
    """In one tensor."""
    micro_batches: int
    """Of a step."""


@dataclass(frozen=True)
class States:
    """Bytes on one rank. Gradients and buffers are those of the step's last backward pass, when most is held."""

    weights: int
    """As stored."""
    gradients: int
    """As accumulated over micro-batches, and this rank's part of their sum."""
    optimizer: int
    """Moments, and float32 values of ZeRO's own."""
    buffers: int
    """What the engine sums gradients through, and weights that stage 3 has gathered for use."""
    step: int
    """Gradients and copies of them after backward, instead of `gradients` and `buffers`."""
    host: int = 0
    """In the host's memory with offload; no part of the device's."""


def states(layout: Layout, weights: Weights) -> States:
    """Of a rank under a legal layout."""
    if layout.engine == "local" or layout.zero_stage == 0:
        return _whole(layout, weights)
    if layout.zero_stage == 3:
        return _stage3(layout, weights)
    if layout.zero_stage == 1 and layout.weights == "bfloat16" and not layout.offload:
        return _stage1_bfloat16(layout, weights)
    return _stage1_or_2(layout, weights)


def weight_bytes(layout: Layout) -> int:
    """Of a weight as it is stored."""
    return 2 if layout.weights == "bfloat16" else FLOAT_BYTES


def _whole(layout: Layout, weights: Weights) -> States:
    """Nothing is divided; DeepSpeed sums copies of gradients after backward, the local engine sums them in place."""
    whole = FLOAT_BYTES * weights.all
    copy = 0 if layout.engine == "local" else min(whole, FLOAT_BYTES * (UNBUCKETED_ELEMENTS + weights.largest))
    return States(whole, whole, MOMENTS * whole, buffers=0, step=whole + copy)


def _stage1_bfloat16(layout: Layout, weights: Weights) -> States:
    """DeepSpeed's BF16_Optimizer: float32 gradients lie in one flat tensor, which is summed in place if it is large."""
    whole = FLOAT_BYTES * weights.all
    return States(
        weights=weight_bytes(layout) * weights.all,
        gradients=whole,
        optimizer=_optimizer(layout, weights),
        buffers=0,
        step=whole * (2 if weights.all <= UNBUCKETED_ELEMENTS else 1),
    )


def _stage1_or_2(layout: Layout, weights: Weights) -> States:
    """A rank keeps the summed gradients of every tensor that it has a part of; in bfloat16 of its part alone."""
    size, narrow, several = weight_bytes(layout), layout.weights == "bfloat16", weights.micro_batches > 1
    part, largest = _part(layout, weights), weights.largest
    own = FLOAT_BYTES * (part if narrow else min(weights.all, part + largest))
    # Stage 1 accumulates whole gradients; at stage 2 a micro-batch's sum lies beside that of the earlier ones.
    whole = FLOAT_BYTES * weights.all if layout.zero_stage == 1 and several else 0
    again = own if layout.zero_stage == 2 and several and not narrow else 0
    staged = FLOAT_BYTES if layout.zero_stage == 1 else size
    buckets = 2 * staged * zero_settings.BUCKET_ELEMENTS  # one is filled while the other is summed
    copied = staged + (FLOAT_BYTES if staged < FLOAT_BYTES else 0)
    normed = DOUBLE_BYTES * min(largest, part)  # a tensor's norm is taken of a copy in double precision
    flat = 0 if narrow else FLOAT_BYTES * part  # the optimizer gets its gradients in one piece
    held = States(
        weights=size * weights.all,
        gradients=whole + again + own,
        optimizer=_optimizer(layout, weights),
        buffers=buckets + copied * _summed(weights),
        step=own + max(flat, normed),
    )
    if not layout.offload:
        return held
    moved = size * largest  # a tensor on its way, on either side; gradients that went there still hold their buckets
    return States(
        weights=held.weights,
        gradients=whole + (own if narrow else 0),
        optimizer=0,
        buffers=held.buffers + moved,
        step=moved + buckets + (held.step if narrow else 0),
        host=held.optimizer + FLOAT_BYTES * part + again + size * part + moved,
    )


def _stage3(layout: Layout, weights: Weights) -> States:
    """Everything is divided; what is in use is gathered."""
    size, part = weight_bytes(layout), _part(layout, weights)
    gathered = min(weights.all, max(zero_settings.LIVE_ELEMENTS, weights.largest))
    gradients, optimizer = FLOAT_BYTES * part, _optimizer(layout, weights)
    bucket = FLOAT_BYTES * zero_settings.BUCKET_ELEMENTS
    return States(
        weights=size * part,
        gradients=0 if layout.offload else gradients,
        optimizer=0 if layout.offload else optimizer,
        buffers=bucket + FLOAT_BYTES * _summed(weights) + size * gathered,
        step=bucket + (0 if layout.offload else gradients + FLOAT_BYTES * min(part, STEPPED_ELEMENTS)),
        host=optimizer + 2 * gradients if layout.offload else 0,
    )


def _part(layout: Layout, weights: Weights) -> int:
    """Weights of which this rank keeps the optimizer's values."""
    return -(-weights.all // layout.shards)


def _summed(weights: Weights) -> int:
    """Gradients that are copied to be summed at once: a bucket, or a tensor that fits in none."""
    return min(weights.all, max(zero_settings.BUCKET_ELEMENTS, weights.largest))


def _optimizer(layout: Layout, weights: Weights) -> int:
    return (1 + MOMENTS) * FLOAT_BYTES * _part(layout, weights)
