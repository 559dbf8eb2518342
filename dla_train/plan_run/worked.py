"""The worked page: for the paper's models on 8, 64 and 512 H100, and for larger ones, which layout to choose.

A batch keeps the paper's 4.2M tokens as long as every data-parallel rank gets a row.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from dla_train.config import Config
from dla_train.hydra_app import compose
from dla_train.plan_run.choice import DRAW, best_plan
from dla_train.plan_run.plan import Plan
from dla_train.plan_run.reach import largest_that_fit, reach_markdown, reach_plans
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
PAGE = """# Layouts of the paper's models

Made by `dla-plan layouts=docs/results/layouts.md` from formulas, without a device; [layouts.json](layouts.json) holds
the numbers. For each run, of all legal layouts with at most 8 ranks a model, in float32 or bfloat16 weights, those
that fit {device_gb:g} GB with a tenth to spare are ordered by a rough count: arithmetic at {mfu:.0%} of {peak_tflops:g}
TFLOP/s, a third more with recomputation, then what is sent at 450 GB/s within a node and 50 GB/s between nodes. **The
count adds the two**, though the engines sum gradients while backward runs. Of all within {draw:.0%} of the quickest the
simplest is shown: fewest ranks a model, lowest ZeRO stage, float32 weights. **Bold** where none fits, with the one that
misses by least. Tokens/s and days are what {mfu:.0%} MFU would give: an assumption, not a measurement. `Rows a step` is
the paper's batch of 4.2M tokens, or one row a data-parallel rank where those are more.

Activations decide here, not states. Two tensor or context ranks halve them for a few percent of the time, recomputation
costs a third of it, so the count divides the model first, and recomputes where 128K tokens leave no choice. ZeRO is
chosen where a rank keeps the whole model or nothing else fits, bfloat16 weights where float32 ones do not fit. At 512
ranks, tensor ranks keep the batch at the paper's 256 rows: two would do, where sums of gradients hide behind backward;
four, which halve those sums, are what the count prefers because it adds them.

| number | checked against |
|---|---|
| activations, plans | what autograd keeps on the CPU; of the Triton operations, in Triton's interpreter |
| the most at once | the peak of a step on the CPU, with PyTorch's operations |
| activations of divided models, bytes sent over tensor and context ranks | two ranks on the CPU |
| weights, gradients, optimizer states, buffers, bytes sent over data ranks, by engine | two ranks on the CPU |
| workspace in Triton, speed, what CUDA and NCCL take themselves | nothing yet: they need GPUs |

Rows hold several documents, for which softmax attention keeps a mask of context x context numbers a layer.

"""
REACH = """
## How far this goes

Gated DeltaNet with DLA, scaled in width and layers, in batches of 256 rows of 16K tokens, chosen in the same way. The
optimizer is moved to the host only where nothing fits without; its time there is not counted.
{largest}

Sending ends a layout before memory does: from ZeRO 2 on, gradients are summed after every micro-batch, and with stage 3
weights are gathered twice as often, over the network. Pipeline stages, which this version does not have, would leave
weights where they are and send activations alone.

"""


def write_worked(path: Path, target: Target) -> None:
    """Write the page, and its JSON beside it."""
    plans, larger = worked_plans(target), reach_plans(target)
    write_json([_of_tables(plan) for plan in (*plans, *larger)], path.with_suffix(".json"))
    shown = {"device_gb": target.device_gb, "mfu": target.mfu, "peak_tflops": target.peak_tflops, "draw": DRAW - 1}
    page = PAGE.format(**shown)
    far = REACH.format(largest=largest_that_fit(larger)) + reach_markdown(larger) + "\n"
    path.write_text(page + table_markdown(plans) + far, encoding="utf-8")


def _of_tables(plan: Plan) -> Plan:
    """The plan without the rules, which all hold, and the parts of a layer."""
    memory = None if plan.memory is None else dataclasses.replace(plan.memory, layer=())
    return dataclasses.replace(plan, checks=(), memory=memory)


def worked_plans(target: Target) -> list[Plan]:
    """The best plan of every run, context and number of ranks."""
    configs = {name: compose([f"experiment={name}"]) for name in EXPERIMENTS}
    points = itertools.product(configs.values(), CONTEXTS, RANKS)
    return [best_plan(_with_context(config, context), ranks, target) for config, context, ranks in points]


def _with_context(config: Config, context: int) -> Config:
    """The run with rows of `context` tokens and as many tokens a step and in all."""
    rows = config.train.global_batch_rows * config.data.context_tokens // context
    data = dataclasses.replace(config.data, context_tokens=context)
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, global_batch_rows=rows))
