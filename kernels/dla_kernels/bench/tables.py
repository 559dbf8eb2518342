"""kernels.json as Markdown: targets, times, memory, parts of a pass, decoding, and what is missing."""

from __future__ import annotations

from typing import Any

from dla_kernels.bench.targets import Results, layer
from dla_kernels.markdown import markdown_table

MARK = {True: "met", False: "**missed**", None: "not measured"}


def markdown(results: Results) -> str:
    """The whole page."""
    parts = [
        _heading(results),
        targets_table(results["targets"]),
        *(layer_table(results, shape, regime) for shape, regime in _measured(results)),
        parts_table(results),
        decode_table(results),
        missing_table(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(results: Results) -> str:
    env, options, rate = results["environment"], results["options"], results["matrix_rate"]
    lines = [
        "# Speed of the operations",
        "",
        "Made by `python -m dla_kernels.bench` and `python -m dla_train.bench render`; numbers in kernels.json.",
        "",
        f"{env['device']}; torch {env['torch']}, triton {env['triton']}, Python {env['python']}; fla: {env['fla']}. "
        f"{options['tokens']:,} tokens in every measurement, in rows of T; {options['dtype']}; medians over "
        f"{options['rounds']} rounds timed in turn on a flushed cache.",
    ]
    if rate is not None:
        lines[-1] += f" torch.matmul in bf16: {rate['tflops']['median']:.0f} TFLOP/s."
    for shape, regimes in results["inputs"].items():
        rates = "; ".join(f"{name}: tau {r['tau']:.2f}, {r['boundary_rate']:.2f}" for name, r in regimes.items())
        lines.append(f"Boundaries per token, {shape}: {rates}.")
    return "\n".join(lines)


def targets_table(targets: dict[str, dict[str, Any]]) -> str:
    """One row a target, with the numbers that decide it."""
    rows = [
        [target["claim"], "; ".join(_numbers(target["numbers"])) or "-", MARK[target["met"]]]
        for target in targets.values()
    ]
    return markdown_table(["target", "measured", ""], rows)


def _numbers(numbers: dict[str, Any]) -> list[str]:
    found = []
    for name, value in numbers.items():
        if isinstance(value, dict):
            inner = ", ".join(_numbers(value))
            found.append(f"{name}: {inner}")
        elif isinstance(value, float):
            found.append(f"{name} {value:.3g}")
        else:
            found.append(f"{name} {'-' if value is None else value}")
    return found


def layer_table(results: Results, shape: str, regime: str) -> str:
    """Milliseconds forward / forward and backward, and peak memory, of every arm at every length."""
    records = [r for r in results["layers"] if (r["kind"], r["shape"], r["regime"]) == ("layers", shape, regime)]
    lengths = sorted({record["length"] for record in records})
    head = [f"T {length // 1024}K" if length >= 1024 else f"T {length}" for length in lengths]
    rows = []
    for arm in dict.fromkeys(record["arm"] for record in records):
        cells = [_cell(results, shape, regime, arm, length, records) for length in lengths]
        if any(cell != "absent" for cell in cells):
            rows.append([arm, *cells])
    title = f"{shape}, {regime} boundaries: milliseconds forward / forward and backward, peak GiB of the latter"
    return f"{title}\n\n{markdown_table(['', *head], rows)}"


def _cell(results: Results, shape: str, regime: str, arm: str, length: int, records: list[dict[str, Any]]) -> str:
    forward, both = (
        layer(results, shape, arm, length, regime=regime, which=which) for which in ("forward", "forward_backward")
    )
    if forward is None and both is None:
        states = [r["status"] for r in records if (r["arm"], r["length"]) == (arm, length)]
        return states[0].replace("_", " ") if states else "-"
    times = " / ".join("-" if r is None else f"{r['milliseconds']['median']:.3g}" for r in (forward, both))
    peak = None if both is None else both["peak_bytes"]
    return times if peak is None else f"{times}, {peak / 2**30:.2g}"


def parts_table(results: Results) -> str:
    """Shares of a training forward pass."""
    if not results["parts"]:
        return ""
    stages = ["plan", "affinity", "weights", "mixing"]
    head = ["", "T", "ms", *stages, "live slots", "mixing TFLOP/s", "of torch.matmul", "by part"]
    rows = [
        [
            f"{r['shape']} {r['arm']}",
            str(r["length"]),
            f"{r['milliseconds']:.3g}",
            *(f"{r['stage_shares'][stage]:.0%}" for stage in stages),
            f"{r['live_slots']:.1f}",
            f"{r['mixing_tflops']:.3g}",
            f"{r['mixing_share_of_matrix_rate']:.0%}",
            ", ".join(f"{part} {share:.0%}" for part, share in _largest(r["part_shares"])),
        ]
        for r in results["parts"]
    ]
    return f"Parts of a training forward pass (soft gates)\n\n{markdown_table(head, rows)}"


def _largest(shares: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(((part, share) for part, share in shares.items() if share >= 0.005), key=lambda item: -item[1])


def decode_table(results: Results) -> str:
    """Latency and bytes of one layer's step by context."""
    if not results["decode"]:
        return ""
    rows = []
    for r in results["decode"]:
        eager, graph = (f"{r[key]['median']:.3g}" if r[key] else "-" for key in ("eager", "graph"))
        rows.append([r["shape"], str(r["batch"]), f"{r['context']:,}", eager, graph, f"{r['bytes']:,}"])
    head = ["", "batch", "context", "ms eager", "ms as a CUDA graph", "cache bytes"]
    return f"One decoding step of one layer, K = 30, content reads\n\n{markdown_table(head, rows)}"


def missing_table(results: Results) -> str:
    """What failed or was left out, and why."""
    rows = [
        [f"{r['shape']}/{r['arm']}, T {r['length']}, {r['regime']}, {r['pass']}", r["status"], r["detail"]]
        for r in results["layers"]
        if r["status"] in ("failed", "out_of_memory")
    ]
    rows += [[entry["job"], "left out", entry["reason"]] for entry in results["left_out"]]
    return markdown_table(["not measured", "", ""], rows) if rows else ""


def _measured(results: Results) -> list[tuple[str, str]]:
    """(shape, regime) pairs with layer records, in their order."""
    return list(dict.fromkeys((r["shape"], r["regime"]) for r in results["layers"] if r["kind"] == "layers"))
