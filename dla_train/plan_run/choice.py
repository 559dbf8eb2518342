"""Which layout to prefer: of all that fit, with a tenth to spare, the simplest of the quickest by a rough count.

The count takes arithmetic at the stated share of the peak, a third more of it with recomputation, and what is sent over
links of an H100 node and its network, one after the other: overlap is not counted, though the engines sum gradients
while backward runs. It orders layouts; it predicts no speed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from dla_train.config import Config, ConfigError
from dla_train.plan_run.layout import Layout
from dla_train.plan_run.plan import Plan, plan
from dla_train.plan_run.target import Target

DEGREES = (1, 2, 4, 8)
"""Tensor and context ranks that are tried: their product stays within a node of 8."""
STORED = (
    (0, "float32"),
    *((stage, weights) for stage in (1, 2, 3) for weights in ("float32", "bfloat16")),
)
"""ZeRO stages (0: the local engine) and types of weights that are tried."""
NODE_BYTES_PER_SECOND = 450e9
"""A rank sends to its node: NVLink of an H100."""
NETWORK_BYTES_PER_SECOND = 50e9
"""A rank sends to other nodes: 400 Gb/s."""
MARGIN = 1.1
"""Predictions are within a tenth of what was measured, so a layout is chosen that fits with a tenth to spare."""
DRAW = 1.03
"""Times that differ less than this are a draw: the count knows neither overlap nor small matrix products."""


def best_plan(config: Config, ranks: int, target: Target, *, offload: bool = False) -> Plan:
    """The plan to prefer among all legal layouts of `ranks` ranks. Raises ConfigError where there is none.

    Of those that fit, with the least rows a step: the simplest that is hardly slower than the quickest. If none fits,
    the one that misses by least.
    """
    tried = (dataclasses.replace(layout, offload=offload) for layout in layouts(config, ranks))
    plans = (plan(_with_rows(config, layout), layout, target) for layout in tried)
    legal = [found for found in plans if found.legal]
    if not legal:
        raise ConfigError(f"world_size={ranks} has no legal layout for {config.name}; plan one by itself to see why")
    fitting = [found for found in legal if comfortable(found)]
    if not fitting:
        return min(legal, key=_held)
    rows = min(found.global_batch_rows for found in fitting)
    quickest = min(rough_seconds(found) for found in fitting if found.global_batch_rows == rows)
    drawn = (f for f in fitting if f.global_batch_rows == rows and rough_seconds(f) <= DRAW * quickest)
    return min(drawn, key=_complication)


def comfortable(found: Plan) -> bool:
    """Whether a rank's memory fits with a margin."""
    return found.memory is not None and found.memory.total * MARGIN <= found.target.device_gb * 1e9


def layouts(config: Config, ranks: int) -> Iterator[Layout]:
    """What is tried, legal or not; sequence parallelism wherever there are tensor ranks."""
    own = Layout.of(config, ranks)
    for tensor, context, (stage, weights), recompute in itertools.product(DEGREES, DEGREES, STORED, (False, True)):
        if tensor * context <= min(ranks, max(DEGREES)):
            yield dataclasses.replace(
                own,
                tensor=tensor,
                context=context,
                sequence=tensor > 1,
                engine="deepspeed" if stage else "local",
                zero_stage=stage,
                weights=weights,
                offload=False,
                recompute=recompute,
                micro_batch_rows=1,
            )


def rough_seconds(found: Plan) -> float:
    """Of a step, by the rough count that orders layouts."""
    return arithmetic_seconds(found) + sending_seconds(found)


def arithmetic_seconds(found: Plan) -> float:
    """Of a step, with what is computed again."""
    return found.speed.step_seconds * (4 / 3 if found.layout.recompute else 1)


def sending_seconds(found: Plan) -> float:
    """Of a step, if nothing of it hid behind arithmetic."""
    assert found.traffic is not None
    inside = (found.traffic.tensor + found.traffic.context) / NODE_BYTES_PER_SECOND
    one_node = found.layout.world_size <= max(DEGREES)
    return inside + found.traffic.data / (NODE_BYTES_PER_SECOND if one_node else NETWORK_BYTES_PER_SECOND)


def _held(found: Plan) -> int:
    assert found.memory is not None
    return found.memory.total


def _complication(found: Plan) -> tuple[float, ...]:
    """Fewer ranks that share a model, whose products stay large; less divided; as stored; quicker."""
    layout = found.layout
    return (layout.tensor * layout.context, layout.zero_stage, layout.weights != "float32", rough_seconds(found))


def _with_rows(config: Config, layout: Layout) -> Config:
    """The run with at least a row for every data-parallel rank, in fewer steps if that is more than it had."""
    train = config.train
    rows = max(train.global_batch_rows, layout.data)
    steps = -(-train.steps * train.global_batch_rows // rows)
    return dataclasses.replace(config, train=dataclasses.replace(train, global_batch_rows=rows, steps=steps))
