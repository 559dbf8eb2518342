"""Bytes of weights, gradients, optimizer states and the engine's buffers on one rank, by engine and ZeRO stage.

Per weight of a rank: the local engine keeps float32 weights, gradients and two moments whole (16 bytes). DeepSpeed from
stage 1 on adds a float32 master copy, of float32 weights too, and divides it and the moments over the ranks with the
same weights (12 bytes over R), stage 2 the gradients, stage 3 the weights. Its defaults cost more than they save on
small models: a bucket of 5e8 gradients whatever the model's size, and up to 1e9 weights that stage 3 leaves gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

from dla_train.plan_run.layout import Layout

FLOAT_BYTES = 4
"""Of states, moments, decays, norms, read weights and loss, whatever the compute type."""
MOMENTS = 2
"""AdamW's, float32."""
LOCAL_BUCKET = 2**26
"""Gradients the local engine sums over ranks at a time."""
DEEPSPEED_BUCKET = 5 * 10**8
"""DeepSpeed's reduce_bucket_size, in gradients; stage 0's buffer holds as many."""
DEEPSPEED_GATHERED = 10**9
"""DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class States:
    """Bytes on one rank between forward and backward, when most is held."""

    weights: int
    """As stored."""
    gradients: int
    """As kept from micro-batch to micro-batch."""
    optimizer: int
    """Moments, and the float32 master copy where there is one."""
    buffers: int
    """What the engine exchanges gradients through, and weights that stage 3 has gathered for use."""


def states(layout: Layout, weights: int) -> States:
    """Of a rank with `weights` weights."""
    if layout.engine == "local":
        bucket = min(weights, LOCAL_BUCKET) if layout.shards > 1 else 0
        whole = FLOAT_BYTES * weights
        return States(whole, whole, MOMENTS * whole, FLOAT_BYTES * bucket)
    size = weight_bytes(layout)
    if layout.zero_stage == 0:
        bucket = min(weights, DEEPSPEED_BUCKET) if layout.shards > 1 else 0
        copies = MOMENTS + (size < FLOAT_BYTES)
        return States(size * weights, size * weights, copies * FLOAT_BYTES * weights, size * bucket)
    return _divided(layout, weights, size)


def _divided(layout: Layout, weights: int, size: int) -> States:
    part = -(-weights // layout.shards)
    whole = layout.zero_stage < 3
    gathered = 0 if whole else min(weights, DEEPSPEED_GATHERED)
    # Stage 1 keeps all gradients until the step's last micro-batch, in the bucket as far as they fit there.
    beyond = max(0, weights - DEEPSPEED_BUCKET) if layout.zero_stage == 1 else 0
    return States(
        weights=size * (weights if whole else part),
        gradients=size * (part + beyond),
        optimizer=(1 + MOMENTS) * FLOAT_BYTES * part,
        buffers=size * (DEEPSPEED_BUCKET + gathered),
    )


def weight_bytes(layout: Layout) -> int:
    """Of a weight as it is stored, and of its gradient."""
    return 2 if layout.weights == "bfloat16" else FLOAT_BYTES
