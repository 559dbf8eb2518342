"""Where a forward pass goes: plan (drift, merges), affinity, weights (gates), mixing (operators, sweep, read).

Stages are timed between events inside one pass. A stage is then divided by the device time of its kernels, told apart
by name; what no name below claims (tensor operations of PyTorch, copies) is the stage's `other`.
"""

from __future__ import annotations

from typing import Any

import torch

from dla_kernels.bench.inputs import Shape
from dla_kernels.bench.layers import MemoryLayer
from dla_kernels.bench.measure import Stopwatch, kernel_times, summary
from dla_kernels.launch import cdiv
from dla_kernels.plan import MemoryPlan

SLOTS = ("slots", ("slot_table", "token_death"))
PARTS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "plan": (("merges", ("merge", "boundary_lists", "capacity")), ("drift", ("drift", "chunk_decays", "write_matrix"))),
    "affinity": (SLOTS, ("affinity", ("affinity", "key_sums"))),
    "weights": (SLOTS, ("weights", ("content_weights", "gate"))),
    "mixing": (
        SLOTS,
        ("operators", ("chunk_decays", "write_matrix", "_operators")),
        ("sweep", ("sweep_states", "write_chunks", "slot_versions")),
        ("read", ("mix_read", "slot_weights")),
        ("gates", ("gate_weights",)),
    ),
}
"""Stage -> (part, what the names of its kernels contain); the first that fits."""


def part_of(stage: str, kernel: str) -> str:
    """Part of a stage that a kernel belongs to."""
    for part, names in PARTS[stage]:
        if any(name in kernel for name in names):
            return part
    return f"{stage}: other"


def measure_parts(layer: MemoryLayer, rounds: int, stopwatch: Stopwatch) -> dict[str, Any]:
    """Milliseconds of the stages of a training forward pass, shares of the parts, and the kernels behind them."""
    with torch.enable_grad():
        for _ in range(2):
            layer.forward(training=True)
        laps: dict[str, list[float]] = {stage: [] for stage in PARTS}
        at: dict[str, Any] = {}
        for _ in range(rounds):
            stages = layer.stages(True, at)
            for stage, milliseconds in zip(stages, stopwatch.laps(list(stages.values())), strict=True):
                laps[stage].append(milliseconds)
        kernels = {stage: kernel_times(stopwatch.device, run) for stage, run in layer.stages(True, at).items()}
    timed = {stage: summary(rounds_) for stage, rounds_ in laps.items()}
    medians = {stage: numbers["median"] for stage, numbers in timed.items()}
    whole = sum(medians.values())
    return {
        "stages": timed,
        "milliseconds": whole,
        "stage_shares": {stage: median / whole for stage, median in medians.items()},
        "part_shares": part_shares(medians, kernels),
        "kernels": {stage: found[:12] for stage, found in kernels.items()},
        "live_slots": live_slots(at["plan"]),
        "chunk": at["plan"].chunk,
    }


def part_shares(medians: dict[str, float], kernels: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Share of each part in the pass: a stage's share, divided as the device time of its kernels."""
    whole = sum(medians.values())
    shares: dict[str, float] = {}
    for stage, found in kernels.items():
        busy = sum(kernel["milliseconds"] for kernel in found)
        for kernel in found:
            part = part_of(stage, kernel["name"])
            share = medians[stage] / whole * kernel["milliseconds"] / busy
            shares[part] = shares.get(part, 0.0) + share
    return shares


def live_slots(plan: MemoryPlan) -> float:
    """Mean number of old slots that a chunk reads: those alive after the last token of the chunk before it."""
    live = plan.live_slots()
    chunks = cdiv(live.shape[1], plan.chunk)
    before = live[:, plan.chunk - 1 : (chunks - 1) * plan.chunk : plan.chunk]
    return float(before.sum()) / (live.shape[0] * live.shape[2] * chunks)


def mixing_flops(shape: Shape, chunk: int, live: float, closed_slots: str) -> float:
    """FLOPs per token of the forward mixing of all heads, multiply-adds counted as 2; causal C x C products as half.

    `live` is the mean number of slots that were alive (`live_slots`), not the capacity; `chunk` is the plan's C, for
    kernels that choose a longer one do no more useful work. Per token and head:
        reads of old slots       2 live K V           at 30 states of 128 x 128 a rough floor of 1 MFLOP
        (M * W) V and writes     C V + 2 K V
        gated_deltanet           2 C^2 / 3 + 3 C K for T, A T, Wy, A Wy, K~, and for each slot that moves (all that
                                 live, the open one alone where closed ones are frozen) the cheaper of
                                 4 K V (low rank, as the kernels do it) and 2 K K V / C
        and once a key head      C K for q k^T, C K more for k k^T of gated_deltanet
    """
    k, v = shape.key_dim, shape.value_dim
    per_head = 2 * live * k * v + chunk * v + 2 * k * v
    per_key_head = float(chunk * k)
    if shape.backbone == "gated_deltanet":
        moved = min(live, 1.0) if closed_slots == "frozen" else live
        per_head += 2 * chunk * chunk / 3 + 3 * chunk * k + moved * min(4 * k * v, 2 * k * k * v / chunk)
        per_key_head += chunk * k
    return shape.heads * per_head + shape.key_heads * per_key_head


def against_matrix_rate(layer: MemoryLayer, parts: dict[str, Any], matrix_tflops: float) -> dict[str, float]:
    """Rate of the mixing stage of `measure_parts`, and its share of the device's measured matrix rate."""
    flops = mixing_flops(layer.shape, parts["chunk"], parts["live_slots"], layer.arm.closed_slots)
    batch, tokens = layer.inputs.v.shape[:2]
    tflops = flops * batch * tokens / parts["stages"]["mixing"]["median"] / 1e9
    return {
        "mixing_flops_per_token": flops,
        "mixing_tflops": tflops,
        "mixing_share_of_matrix_rate": tflops / matrix_tflops,
    }
