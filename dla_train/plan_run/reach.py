"""How large a model the layouts of this version carry: Gated DeltaNet with DLA from 7B to 180B at 16K context.

The paper's model is scaled in width and layers alone: heads of the same sizes, of which there is one per 256 of width,
and the MLP in proportion. Where no layout fits, the optimizer is moved to the host, whose time is not planned.
"""

from __future__ import annotations

import dataclasses
import itertools

from dla_kernels.markdown import markdown_table
from dla_train.config import Config
from dla_train.hydra_app import compose
from dla_train.plan_run.choice import arithmetic_seconds, best_plan, comfortable, sending_seconds
from dla_train.plan_run.plan import Plan
from dla_train.plan_run.report import GB, described
from dla_train.plan_run.target import Target

EXPERIMENT = "paper_gated_deltanet_1300m_dla"
SIZES = {"7B": (4096, 28), "13B": (6144, 24), "30B": (8192, 32), "70B": (8192, 74), "180B": (16384, 48)}
"""Width and layers."""
RANKS = (8, 64, 512)


def reach_plans(target: Target) -> list[Plan]:
    """For every size and number of ranks the plan to prefer, with offload only where nothing fits without."""
    base = compose([f"experiment={EXPERIMENT}"])
    found: list[Plan] = []
    for (size, (width, layers)), ranks in itertools.product(SIZES.items(), RANKS):
        config = scaled(base, size, width, layers)
        best = best_plan(config, ranks, target)
        found.append(best if comfortable(best) else best_plan(config, ranks, target, offload=True))
    return found


def scaled(config: Config, name: str, width: int, layers: int) -> Config:
    """The run with a model of another width and depth."""
    model = config.model
    growth = width / model.width
    heads = round(model.num_heads * growth)
    model = dataclasses.replace(
        model,
        name=f"gated_deltanet_{name}",
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_key_heads=heads,
        mlp_width=round(model.mlp_width * growth),
    )
    return dataclasses.replace(config, name=f"{name}, DLA", model=model)


def largest_that_fit(plans: list[Plan]) -> str:
    """A sentence: for every number of ranks the largest model that fits without the host's memory."""
    fitting = {plan.layout.world_size: plan for plan in plans if comfortable(plan) and not plan.layout.offload}
    parts = [f"{plan.parameters / 1e9:.0f}B on {ranks}" for ranks, plan in sorted(fitting.items())]
    return f"The largest of these that fit without: {', '.join(parts)} ranks."


def reach_markdown(plans: list[Plan]) -> str:
    """The table of `reach_plans`."""
    head = ["model", "parameters", "ranks", "layout", "memory, GB", "host, GB a rank", "arithmetic + sending, s a step"]
    rows = []
    for plan in plans:
        assert plan.memory is not None
        held = f"{plan.memory.total / GB:.1f}"
        rows.append(
            [
                plan.name,
                f"{plan.parameters / 1e9:.1f} G",
                str(plan.layout.world_size),
                described(plan.layout),
                held if comfortable(plan) else f"**{held}: does not fit**",
                f"{plan.memory.states.host / GB:.0f}",
                f"{arithmetic_seconds(plan):.1f} + {sending_seconds(plan):.1f}",
            ]
        )
    return markdown_table(head, rows)
