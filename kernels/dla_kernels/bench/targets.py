"""What the numbers were meant to be: each target met (true), missed (false) or not measured (null), with its numbers.

A target of several parts is met if all of them are, and not measured while one that could still miss it is absent.
Times are medians of training's forward and backward pass at tau 0.6 (3 of 4 tokens open a slot) with the default
dynamic memory: closed slots in transition, reads by content, soft gates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DYNAMIC = "dla_k{}_transition_content"
REFERENCE_LENGTH = 16384
MATRIX_SHARE = 0.35
PLANNER_SHARE = 0.20
GROWTH = 2.1
"""Most that doubling T may multiply the time of one sequence by."""
FLATNESS = 1.05
"""Most that the largest latency or size may exceed the smallest by."""

Results = dict[str, Any]
Numbers = dict[str, Any]
Verdict = bool | None


def judge(results: Results) -> dict[str, dict[str, Any]]:
    """Every target by name: claim, met, numbers."""
    return {name: {"claim": claim} | _verdict(check(results)) for name, (claim, check) in TARGETS.items()}


def _verdict(found: tuple[list[Verdict], Numbers]) -> dict[str, Any]:
    parts, numbers = found
    met: Verdict = False if False in parts else None if None in parts or not parts else True
    return {"met": met, "numbers": numbers}


def layer(
    results: Results,
    shape: str,
    arm: str,
    length: int,
    *,
    kind: str = "layers",
    regime: str = "dense",
    which: str = "forward_backward",
) -> Numbers | None:
    """The record of an arm and pass, None where it was not measured. kind: `layers` (constant B * T) or `batch_1`."""
    wanted = {"kind": kind, "shape": shape, "arm": arm, "length": length, "regime": regime, "pass": which}
    for record in results["layers"]:
        if "milliseconds" in record and all(record[key] == value for key, value in wanted.items()):
            return record if record["status"] == "ok" else None
    return None


def milliseconds(record: Numbers | None) -> float | None:
    """Median of a record."""
    return None if record is None else record["milliseconds"]["median"]


def faster_than_log_linear(results: Results) -> tuple[list[Verdict], Numbers]:
    """On Mamba-2 from 4K on: less time and less memory than fla's log-linear kernel, or ours where there is none."""
    parts: list[Verdict] = []
    numbers: Numbers = {}
    for length in _lengths(results, 4096):
        ours = layer(results, "mamba2", DYNAMIC.format(30), length)
        against, name = _first(results, "mamba2", ("fla_log_linear", "log_linear"), length)
        row: Numbers = {"against": name}
        for key, value in (("milliseconds", milliseconds), ("peak_bytes", lambda r: r and r["peak_bytes"])):
            a, b = value(ours), value(against)
            row[key] = {"dla": a, "log_linear": b}
            parts.append(None if a is None or b is None else a < b)
        numbers[str(length)] = row
    return parts, numbers


def near_single_state(results: Results) -> tuple[list[Verdict], Numbers]:
    """On Gated DeltaNet at 16K: K = 30 within 4 times, K = 8 within 2 times the single-state chunk rule."""
    parts: list[Verdict] = []
    numbers: Numbers = {}
    single, name = _first(results, "gated_deltanet", ("fla_single", "single"), REFERENCE_LENGTH)
    for capacity, limit in ((30, 4.0), (8, 2.0)):
        ours = milliseconds(layer(results, "gated_deltanet", DYNAMIC.format(capacity), REFERENCE_LENGTH))
        ratio = _ratio(ours, milliseconds(single))
        numbers[f"K = {capacity}"] = {"against": name, "ratio": ratio, "limit": limit}
        parts.append(None if ratio is None else ratio <= limit)
    return parts, numbers


def faster_than_attention(results: Results) -> tuple[list[Verdict], Numbers]:
    """From 16K on faster than FlashAttention, at 64K at least 4 times."""
    parts: list[Verdict] = []
    numbers: Numbers = {}
    for shape in ("mamba2", "gated_deltanet"):
        for length in sorted({*_lengths(results, REFERENCE_LENGTH), 65536}):
            ours = milliseconds(layer(results, shape, DYNAMIC.format(30), length))
            speedup = _ratio(milliseconds(layer(results, shape, "flash_attention", length)), ours)
            limit = 4.0 if length == 65536 else 1.0
            numbers[f"{shape}, {length}"] = {"times faster": speedup, "limit": limit}
            parts.append(None if speedup is None else speedup >= limit)
    return parts, numbers


def linear_in_length(results: Results) -> tuple[list[Verdict], Numbers]:
    """time(2T) / time(T) of one sequence (batch 1) from 8K on.

    Beside it stands the same ratio at constant B * T, that is twice the time of a token at 2T over that at T: it also
    counts what a smaller batch leaves idle, and decides nothing.
    """
    parts: list[Verdict] = []
    numbers: Numbers = {}
    lengths = _lengths(results, 8192)
    for shape in ("mamba2", "gated_deltanet"):
        for short, long in zip(lengths, lengths[1:], strict=False):
            if long != 2 * short:
                continue
            arm = DYNAMIC.format(30)
            one = [milliseconds(layer(results, shape, arm, t, kind="batch_1")) for t in (short, long)]
            full = [layer(results, shape, arm, t) for t in (short, long)]
            ratio = _ratio(one[1], one[0])
            numbers[f"{shape}, {long}/{short}"] = {"batch 1": ratio, "constant B T": _ratio(*_per_token(full))}
            parts.append(None if ratio is None else ratio <= GROWTH)
    return parts, numbers


def near_matrix_rate(results: Results) -> tuple[list[Verdict], Numbers]:
    """The forward mixing of K = 30 slots, FLOPs of slots that are alive, against torch.matmul in bf16."""
    found = {shape: record["mixing_share_of_matrix_rate"] for shape, record in _parts(results).items()}
    return [share >= MATRIX_SHARE for share in found.values()], found


def small_planner(results: Results) -> tuple[list[Verdict], Numbers]:
    """Share of plan_memory in a training forward pass at 16K."""
    found = {shape: record["stage_shares"]["plan"] for shape, record in _parts(results).items()}
    return [share <= PLANNER_SHARE for share in found.values()], found


def flat_decoding(results: Results) -> tuple[list[Verdict], Numbers]:
    """Largest over smallest, over contexts from 1K to 128K, of a step's latency (its graph's) and of the cache."""
    parts: list[Verdict] = []
    numbers: Numbers = {}
    for shape, batch in sorted({(record["shape"], record["batch"]) for record in results["decode"]}):
        records = [r for r in results["decode"] if (r["shape"], r["batch"]) == (shape, batch)]
        contexts = [record["context"] for record in records]
        latencies = [(record["graph"] or record["eager"])["median"] for record in records]
        sizes = [record["bytes"] for record in records]
        flatness = {"latency": max(latencies) / min(latencies), "bytes": max(sizes) / min(sizes)}
        numbers[f"{shape}, batch {batch}"] = flatness | {"milliseconds": latencies[-1], "cache bytes": sizes[-1]}
        whole_range = min(contexts) <= 1024 and max(contexts) >= 131072
        parts += [value <= FLATNESS if whole_range else None for value in flatness.values()]
    return parts, numbers


TARGETS: dict[str, tuple[str, Callable[[Results], tuple[list[Verdict], Numbers]]]] = {
    "log_linear": ("DLA on Mamba-2, K = 30: less time and memory than log-linear from 4K on", faster_than_log_linear),
    "single_state": (
        "DLA on Gated DeltaNet within 4 times (K = 30) and 2 times (K = 8) of the single state at 16K",
        near_single_state,
    ),
    "attention": (
        "DLA, K = 30: faster than FlashAttention from 16K on, at 64K at least 4 times",
        faster_than_attention,
    ),
    "growth": (f"doubling T from 8K to 128K multiplies DLA's time by at most {GROWTH}", linear_in_length),
    "matrix_rate": (f"mixing, forward, K = 30: at least {MATRIX_SHARE:.0%} of torch.matmul in bf16", near_matrix_rate),
    "planner": (f"planning takes at most {PLANNER_SHARE:.0%} of a forward pass at 16K", small_planner),
    "decode": (f"latency and cache of a step flat within {FLATNESS - 1:.0%} from 1K to 128K", flat_decoding),
}
"""Name -> (claim, what decides it)."""


def _lengths(results: Results, least: int) -> list[int]:
    """Lengths asked for, or measured by an earlier run into the same file."""
    lengths = {*results["options"]["lengths"], *(record["length"] for record in results["layers"])}
    return sorted(length for length in lengths if length >= least)


def _first(results: Results, shape: str, arms: tuple[str, ...], length: int) -> tuple[Numbers | None, str]:
    """The first of `arms` that was measured, and its name."""
    for arm in arms:
        record = layer(results, shape, arm, length)
        if record is not None:
            return record, arm
    return None, arms[0]


def _parts(results: Results) -> dict[str, Numbers]:
    """Parts of the default dynamic memory's pass at 16K, by shape."""
    wanted = DYNAMIC.format(30), REFERENCE_LENGTH
    return {record["shape"]: record for record in results["parts"] if (record["arm"], record["length"]) == wanted}


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _per_token(records: list[Numbers | None]) -> tuple[float | None, float | None]:
    """(twice the time of a token in the longer, that in the shorter) of records (shorter, longer)."""
    costs = [
        None if record is None else record["milliseconds"]["median"] / (record["batch"] * record["length"])
        for record in records
    ]
    return (None if costs[1] is None else 2 * costs[1]), costs[0]
