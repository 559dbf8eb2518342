"""The worked table: for the paper's models on 8, 64 and 512 H100, the layout that fits and sends least.

Of all layouts that divide the model, those are compared that fit the device; recomputation counts before traffic, since
it costs a third more arithmetic whatever the network. A batch keeps the paper's 4.2M tokens as long as every
data-parallel rank gets a row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from dla_train.config import Config
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
"""Tensor and context ranks that are tried: within a node of 8."""

PAGE = """# Layouts of the paper's models

Made by `dla-plan layouts=docs/results/layouts.md` from formulas, without a device; [layouts.json](layouts.json) holds
every number. For each run, of all layouts with at most 8 ranks a model, the one that fits {device_gb:g} GB and sends
least; **bold** where none fits, with the one that misses by least. Speed and days are what an MFU of {mfu:.0%} of
{peak_tflops:g} TFLOP/s a rank would give: an assumption, not a measurement. `rows a step` is the paper's batch of 4.2M
tokens, or one row a data-parallel rank where those are more.

What of this is checked, and against what:

| number | against |
|---|---|
| activations, plans | what autograd keeps on the CPU; of the Triton operations, in Triton's interpreter |
| the most at once | the peak of a step on the CPU, PyTorch's operations |
| tensor and context traffic, their share of the activations | two ranks on the CPU |
| weights, gradients, optimizer states | both engines on one rank |
| workspace in Triton, DeepSpeed's buffers and traffic, speed | nothing yet: they need GPUs |

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
    """The plan to prefer among all layouts of `ranks` ranks that divide the model."""
    plans = (plan(_with_rows(config, layout), layout, target) for layout in layouts(config, ranks))
    return min((found for found in plans if found.memory is not None), key=_preference)


def layouts(config: Config, ranks: int) -> Iterator[Layout]:
    """What is tried, legal or not; sequence parallelism wherever there are tensor ranks."""
    for tensor, context, stage, recompute in itertools.product(DEGREES, DEGREES, (1, 2, 3), (False, True)):
        if tensor * context <= min(ranks, max(DEGREES)):
            yield dataclasses.replace(
                Layout.of(config, ranks),
                tensor=tensor, context=context, sequence=tensor > 1, engine="deepspeed", zero_stage=stage,
                recompute=recompute, micro_batch_rows=1,
            )  # fmt: skip


def _preference(found: Plan) -> tuple[float, ...]:
    """Least is best: fitting, the batch the paper has, no recomputation, little traffic, little memory."""
    assert found.memory is not None and found.traffic is not None
    if not found.fits:
        return (1, found.memory.total)
    return (0, found.global_batch_rows, found.layout.recompute, found.traffic.total, found.memory.total)


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
