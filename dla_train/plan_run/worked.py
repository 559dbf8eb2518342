"""The worked table: for the paper's models on 8, 64 and 512 H100, which layout fits and is quickest by a rough count.

The count takes arithmetic at the stated share of the peak, a third more of it with recomputation, and what is sent over
links of an H100 node and its network, one after the other. It orders layouts; it predicts no speed. A batch keeps the
paper's 4.2M tokens as long as every data-parallel rank gets a row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from dla_train.config import Config, ConfigError
from dla_train.hydra_app import compose
from dla_train.plan_run.layout import Layout
from dla_train.plan_run.plan import Plan, plan
from dla_train.plan_run.report import table_markdown, write_json
from dla_train.plan_run.target import Target

EXPERIMENTS = (
    "paper_mamba2_780m_single",
    "paper_mamba2_780m_dla",
    "paper_gated_deltanet_1300m_single",
    "paper_gated_deltanet_1300m_dla",
    "paper_transformer_778m",
)
RANKS = (8, 64, 512)
CONTEXTS = (16384, 131072)
DEGREES = (1, 2, 4, 8)
"""Tensor and context ranks that are tried: their product stays within a node of 8."""
NODE_BYTES_PER_SECOND = 450e9
"""A rank sends to its node: NVLink of an H100."""
NETWORK_BYTES_PER_SECOND = 50e9
"""A rank sends to other nodes: 400 Gb/s."""
MARGIN = 1.1
"""Predictions are within a tenth of what was measured, so a layout is chosen that fits with a tenth to spare."""

PAGE = """# Layouts of the paper's models

Made by `dla-plan layouts=docs/results/layouts.md` from formulas, without a device; [layouts.json](layouts.json) holds
every number. For each run, of all legal layouts with at most 8 ranks a model, the one that fits {device_gb:g} GB with a
tenth to spare and is quickest by a rough count: arithmetic at {mfu:.0%} of {peak_tflops:g} TFLOP/s, a third more with
recomputation, then what is sent at 450 GB/s within a node and 50 GB/s between nodes. **Bold** where none fits, with the
one that misses by least. Tokens/s and days are what {mfu:.0%} MFU would give: an assumption, not a measurement. `Rows a
step` is the paper's batch of 4.2M tokens, or one row a data-parallel rank where those are more.

| number | checked against |
|---|---|
| activations, plans | what autograd keeps on the CPU; of the Triton operations, in Triton's interpreter |
| the most at once | the peak of a step on the CPU, with PyTorch's operations |
| activations of divided models, bytes sent over tensor and context ranks | two ranks on the CPU |
| weights, gradients, optimizer states | the local engine on one rank; DeepSpeed on two, without gradients |
| workspace in Triton, DeepSpeed's buffers, bytes sent over data ranks, speed | nothing yet: they need GPUs |

Rows hold several documents, for which softmax attention keeps a mask of context x context numbers a layer.

"""


def write_worked(path: Path, target: Target) -> None:
    """Write the page, and its JSON beside it."""
    plans = worked_plans(target)
    write_json(plans, path.with_suffix(".json"))
    page = PAGE.format(device_gb=target.device_gb, mfu=target.mfu, peak_tflops=target.peak_tflops)
    path.write_text(page + table_markdown(plans), encoding="utf-8")


def worked_plans(target: Target) -> list[Plan]:
    """The best plan of every run, context and number of ranks."""
    configs = {name: compose([f"experiment={name}"]) for name in EXPERIMENTS}
    points = itertools.product(configs.values(), CONTEXTS, RANKS)
    return [best_plan(_with_context(config, context), ranks, target) for config, context, ranks in points]


def best_plan(config: Config, ranks: int, target: Target) -> Plan:
    """The plan to prefer among all legal layouts of `ranks` ranks. Raises ConfigError where there is none."""
    plans = (plan(_with_rows(config, layout), layout, target) for layout in layouts(config, ranks))
    legal = [found for found in plans if found.legal]
    if not legal:
        raise ConfigError(f"world_size={ranks} has no legal layout for {config.name}; plan one by itself to see why")
    return min(legal, key=_preference)


def layouts(config: Config, ranks: int) -> Iterator[Layout]:
    """What is tried, legal or not; sequence parallelism wherever there are tensor ranks."""
    own = Layout.of(config, ranks)
    for tensor, context, stage, recompute in itertools.product(DEGREES, DEGREES, range(4), (False, True)):
        if tensor * context <= min(ranks, max(DEGREES)):
            yield dataclasses.replace(
                own,
                tensor=tensor,
                context=context,
                sequence=tensor > 1,
                engine="deepspeed" if stage else "local",
                zero_stage=stage,
                recompute=recompute,
                micro_batch_rows=1,
            )


def rough_seconds(found: Plan) -> float:
    """Of a step, by the rough count that orders layouts."""
    assert found.traffic is not None
    arithmetic = found.speed.step_seconds * (4 / 3 if found.layout.recompute else 1)
    inside = (found.traffic.tensor + found.traffic.context) / NODE_BYTES_PER_SECOND
    one_node = found.layout.world_size <= max(DEGREES)
    return arithmetic + inside + found.traffic.data / (NODE_BYTES_PER_SECOND if one_node else NETWORK_BYTES_PER_SECOND)


def _preference(found: Plan) -> tuple[float, ...]:
    """Least is best: fitting with a margin, the batch the paper has, time."""
    assert found.memory is not None
    if found.memory.total * MARGIN > found.target.device_gb * 1e9:
        return (1, found.memory.total)
    return (0, found.global_batch_rows, rough_seconds(found), found.memory.total)


def _with_context(config: Config, context: int) -> Config:
    """The run with rows of `context` tokens and as many tokens a step and in all."""
    rows = config.train.global_batch_rows * config.data.context_tokens // context
    data = dataclasses.replace(config.data, context_tokens=context)
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, global_batch_rows=rows))


def _with_rows(config: Config, layout: Layout) -> Config:
    """The run with at least a row for every data-parallel rank, in fewer steps if that is more than it had."""
    train = config.train
    rows = max(train.global_batch_rows, layout.data)
    steps = -(-train.steps * train.global_batch_rows // rows)
    return dataclasses.replace(config, train=dataclasses.replace(train, global_batch_rows=rows, steps=steps))
