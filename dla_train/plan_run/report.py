"""A plan as text for a person, as JSON for a program, and several as Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dla_kernels.markdown import markdown_table
from dla_train.plan_run.budget import Budget
from dla_train.plan_run.layout import Layout
from dla_train.plan_run.plan import Plan

GB = 1e9
LARGEST = 8
"""Parts of a layer that are listed by name."""


def report(plan: Plan) -> str:
    """The whole plan as lines of text; sizes in GB of 1e9 bytes."""
    sections = [_headline(plan), _rules(plan), _model(plan)]
    if plan.memory is not None:
        sections += [_memory(plan, plan.memory), _layer(plan.memory), _traffic(plan)]
    return "\n\n".join([*sections, _speed(plan)]) + "\n"


def write_json(plans: Sequence[Plan], path: Path) -> None:
    """One plan as an object, several as a list."""
    values = [plan.as_dict() for plan in plans]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values[0] if len(values) == 1 else values, indent=1) + "\n", encoding="utf-8")


def table_markdown(plans: Sequence[Plan]) -> str:
    """Two tables: layouts with their speed and traffic, and the memory of a rank by kind."""
    chosen = ["run", "context", "ranks", "layout", "rows a step", "memory, GB"]
    chosen += ["sent, GB a step: tensor, context, data", "tokens/s", "days"]
    kinds = [
        "run",
        "context",
        "ranks",
        "weights",
        "gradients",
        "optimizer",
        "buffers",
        "activations",
        "plans",
        "carried",
    ]
    kinds += ["one layer again", "workspace", "logits and loss", "in the step", "most at once"]
    layouts = markdown_table(chosen, [_chosen_row(plan) for plan in plans])
    memory = markdown_table(kinds, [_kinds_row(plan) for plan in plans if plan.memory is not None])
    return f"{layouts}\n\nMemory of a rank, GB:\n\n{memory}\n"


def described(layout: Layout) -> str:
    """A layout in a few words."""
    axes = f"{layout.data} data x {layout.context} context x {layout.tensor} tensor"
    parts = [axes + (" with sequence" if layout.sequence else "")]
    parts.append("local engine" if layout.engine == "local" else f"ZeRO {layout.zero_stage}")
    parts += ["bfloat16 weights"] if layout.weights == "bfloat16" else []
    parts += ["optimizer on the host"] if layout.offload else []
    parts += ["recomputation"] if layout.recompute else []
    return ", ".join(parts)


def _headline(plan: Plan) -> str:
    layout = plan.layout
    rows = f"{plan.micro_batches} micro-batches of {layout.micro_batch_rows} rows of {plan.context_tokens} tokens"
    return f"{plan.name} on {layout.world_size} ranks: {described(layout)}\na rank's step: {rows}"


def _rules(plan: Plan) -> str:
    lines = [f"  no  {check.problem}" if check.problem else f"  ok  {check.rule}" for check in plan.checks]
    return "\n".join(["rules", *lines])


def _model(plan: Plan) -> str:
    a_rank = "" if plan.parameters_per_rank is None else f", {plan.parameters_per_rank / 1e6:,.1f} M of them on a rank"
    flops = plan.flops
    rows = [
        ("parameters", f"{plan.parameters / 1e6:,.1f} M{a_rank}"),
        ("FLOPs a token", f"{flops.forward / 1e9:.3f} G forward, {flops.training / 1e9:.3f} G with backward"),
    ]
    return _lines("model", rows)


def _memory(plan: Plan, memory: Budget) -> str:
    rows = [(name, f"{size / GB:10.3f}") for name, size in _kinds(memory)]
    verdict = "fits" if plan.fits else "does not fit"
    rows[-1] = (rows[-1][0], f"{rows[-1][1]}  {verdict} {plan.target.device_gb:g} GB")
    rows.append(("on the host, a rank", f"{memory.states.host / GB:10.3f}"))
    rows.append(("decode cache, a sequence", f"{memory.cache_bytes / GB:10.3f}"))
    title = f"memory of a rank, GB ({plan.device}, memory operations in {plan.backend})"
    note = (
        "  not held together, the largest counts: the loss; one layer and its workspace; the step without activations"
    )
    return _lines(title, rows) + "\n" + note


def _kinds(memory: Budget) -> list[tuple[str, int]]:
    states = memory.states
    return [
        ("weights", states.weights),
        ("gradients", states.gradients),
        ("optimizer states", states.optimizer),
        ("engine's buffers", states.buffers),
        ("activations", memory.activations),
        ("memory plans", memory.plans),
        ("carried memory", memory.carried),
        ("one layer, recomputed", memory.recomputed),
        ("workspace of a layer", memory.workspace),
        ("logits and loss", memory.loss),
        ("gradients in the step", states.step),
        *([("copy for published tasks", memory.evaluation)] if memory.evaluation else []),
        ("most at once", memory.total),
    ]


def _layer(memory: Budget) -> str:
    parts = sorted(memory.layer, key=lambda part: -part.bytes)
    rows = [(part.name, f"{part.bytes / GB:10.3f}") for part in parts[:LARGEST]]
    others = sum(part.bytes for part in parts[LARGEST:])
    return _lines("of which one layer keeps for backward, GB", [*rows, ("the rest", f"{others / GB:10.3f}")])


def _traffic(plan: Plan) -> str:
    assert plan.traffic is not None
    seconds = plan.speed.step_seconds
    axes = {"tensor": plan.traffic.tensor, "context": plan.traffic.context, "data": plan.traffic.data}
    axes["all"] = plan.traffic.total
    rows = [
        (axis, f"{size / GB:10.3f}   {size / GB / seconds:8.2f} GB/s at the speed below") for axis, size in axes.items()
    ]
    return _lines("sent by a rank in a step, GB", rows)


def _speed(plan: Plan) -> str:
    speed = plan.speed
    rows = [
        ("tokens/s", f"{speed.tokens_per_second:,.0f}, a step takes {speed.step_seconds:,.2f} s"),
        (
            "the whole run",
            f"{speed.tokens / 1e9:,.2f} G tokens in {speed.days:,.2f} days, {speed.device_hours:,.0f} device hours",
        ),
    ]
    return _lines(f"speed at {plan.target.mfu:.0%} of {plan.target.peak_tflops:g} TFLOP/s a rank (assumed)", rows)


def _lines(title: str, rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join([title, *(f"  {name:24} {value}" for name, value in rows)])


def _chosen_row(plan: Plan) -> list[str]:
    sent = "-"
    if plan.traffic is not None:
        sizes = (plan.traffic.tensor, plan.traffic.context, plan.traffic.data)
        sent = ", ".join(f"{size / GB:.1f}" if size else "0" for size in sizes)
    held = "-" if plan.memory is None else f"{plan.memory.total / GB:.1f}"
    return [
        plan.name,
        _thousands(plan.context_tokens),
        str(plan.layout.world_size),
        described(plan.layout),
        str(plan.global_batch_rows),
        held if plan.fits else f"**{held}: does not fit**",
        sent,
        f"{plan.speed.tokens_per_second / 1e3:,.0f}k",
        f"{plan.speed.days:.3g}",
    ]


def _kinds_row(plan: Plan) -> list[str]:
    assert plan.memory is not None
    sizes = [f"{size / GB:.2f}" if size else "0" for _, size in _kinds(plan.memory)]
    return [plan.name, _thousands(plan.context_tokens), str(plan.layout.world_size), *sizes]


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
