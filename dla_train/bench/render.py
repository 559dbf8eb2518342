"""Pages and pictures of docs/results from kernels.json and training.json: made on any machine, not only the measured.

`kernels_page` and `training_page` give the Markdown alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dla_kernels.bench.session import RESULTS as KERNELS
from dla_kernels.bench.tables import MARK, markdown
from dla_kernels.bench.targets import judge, layer
from dla_kernels.markdown import markdown_table
from dla_train.bench.training import RESULTS as TRAINING
from dla_train.bench.training import judge as judge_training

ARMS = {
    "dla_k30_transition_content": ("dla, K = 30", "tab:red", "o-"),
    "dla_k8_transition_content": ("dla, K = 8", "tab:orange", "o-"),
    "single": ("single state", "tab:blue", "s-"),
    "log_linear": ("log-linear", "tab:green", "s-"),
    "fla_single": ("single state (fla)", "tab:blue", "x--"),
    "fla_log_linear": ("log-linear (fla)", "tab:green", "x--"),
    "flash_attention": ("FlashAttention", "0.35", "^-"),
}
"""Arms of the pictures: label, colour, line."""


def main(arguments: list[str] | None = None) -> int:
    """Render what there is; exit code 2 where there is nothing."""
    parser = argparse.ArgumentParser(prog="python -m dla_train.bench render", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder (default %(default)s)")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="folder (default %(default)s)")
    options = parser.parse_args(arguments)
    written = render(options.results, options.images)
    if not written:
        print(f"error: {options.results} holds neither {KERNELS} nor {TRAINING}; measure first", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in written))
    return 0


def render(results: Path, images: Path) -> list[Path]:
    """Write the pages beside the JSON and the pictures; returns what was written."""
    written = []
    if (results / KERNELS).is_file():
        found = _load(results / KERNELS)
        written += [_page(results / "kernels.md", kernels_page(found)), *_kernel_pictures(found, images)]
    if (results / TRAINING).is_file():
        found = _load(results / TRAINING)
        written += [_page(results / "training.md", training_page(found))]
        if any(record["status"] == "ok" for record in found["steps"]):
            written.append(plot_training(found, images / "training_speed.png"))
    return written


def kernels_page(results: dict[str, Any]) -> str:
    """kernels.json as Markdown, targets judged anew."""
    return markdown(results | {"targets": judge(results)})


def training_page(results: dict[str, Any]) -> str:
    """training.json as Markdown, targets judged anew."""
    env = results["environment"]
    measured = [
        "model",
        "memory",
        "T",
        "rows",
        "recompute",
        "tokens/s (least to most)",
        "MFU",
        "peak GiB",
        "boundaries",
    ]
    costliest = ["five costliest kernels of a step", "T", "share of the device's time"]
    sections = [
        "# Speed of training steps",
        "Made by `make bench-train` and `python -m dla_train.bench render`; numbers in training.json.",
        f"One {env['device']}; torch {env['torch']}, triton {env['triton']}, Python {env['python']}. Forward, backward "
        "and optimizer step on random tokens, bf16; medians, with least and most. MFU counts the FLOPs of "
        "models/cost.py, without recomputation.",
        markdown_table(["target", "measured", ""], map(_target_row, judge_training(results).values())),
        markdown_table(measured, map(_training_row, results["steps"])),
    ]
    if results["profiles"]:
        sections.append(markdown_table(costliest, map(_profile_row, results["profiles"])))
    if results["left_out"]:
        missing = [[entry["job"], entry["reason"]] for entry in results["left_out"]]
        sections.append(markdown_table(["not measured", ""], missing))
    return "\n\n".join(sections) + "\n"


def _target_row(target: dict[str, Any]) -> list[str]:
    numbers = "; ".join(f"{k}: {'-' if v is None else f'{v:.2f}'}" for k, v in target["numbers"].items())
    return [target["claim"], numbers or "-", MARK[target["met"]]]


def _training_row(r: dict[str, Any]) -> list[str]:
    head = [r["model"], r["memory"], str(r["context"]), str(r["rows"]), "yes" if r["recompute"] else "no"]
    if r["status"] != "ok":
        return [*head, r["status"].replace("_", " "), "-", "-", "-"]
    speed = r["tokens_per_second"]
    return [
        *head,
        f"{speed['median']:,.0f} ({speed['least']:,.0f} to {speed['most']:,.0f})",
        "-" if r["mfu"] is None else f"{r['mfu']:.1%}",
        "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.1f}",
        "-" if r["boundary_rate"] is None else f"{r['boundary_rate']:.2f}",
    ]


def _profile_row(profile: dict[str, Any]) -> list[str]:
    top = ", ".join(f"{_short(kernel['name'])} {kernel['share']:.0%}" for kernel in profile["top"])
    return [f"{profile['model']} {profile['memory']}", str(profile["context"]), top]


def _short(name: str) -> str:
    """A kernel's name without template arguments, at most 48 characters, harmless in a table."""
    bare = name.split("<")[0].removeprefix("void ").replace("|", "/")
    return f"`{bare[:48]}`"


def _kernel_pictures(results: dict[str, Any], images: Path) -> list[Path]:
    written = []
    if any("milliseconds" in record for record in results["layers"]):
        written.append(plot_layers(results, images / "kernels_layers.png"))
    if results["parts"]:
        written.append(plot_parts(results, images / "kernels_parts.png"))
    if results["decode"]:
        written.append(plot_decode(results, images / "kernels_decode.png"))
    return written


def plot_layers(results: dict[str, Any], path: Path) -> Path:
    """Time of a token against the length, forward and backward, one panel a shape."""
    shapes = list(dict.fromkeys(r["shape"] for r in results["layers"] if r["kind"] == "layers"))
    figure = Figure(figsize=(5 * len(shapes), 4.5), layout="constrained")
    for shape, axes in zip(shapes, figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0], strict=True):
        lengths = sorted({r["length"] for r in results["layers"] if r["shape"] == shape})
        for arm, (label, colour, line) in ARMS.items():
            found = [record for t in lengths if (record := layer(results, shape, arm, t)) is not None]
            costs = [1e6 * r["milliseconds"]["median"] / (r["batch"] * r["length"]) for r in found]
            if found:
                axes.plot([r["length"] for r in found], costs, line, color=colour, label=label, markersize=4)
        axes.set_title(shape)
        axes.set_xlabel("T (tokens of a row; B T constant)")
        _logarithmic(axes, lengths)
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("ns a token, forward and backward")
    return _save(figure, path)


def plot_parts(results: dict[str, Any], path: Path) -> Path:
    """Shares of the parts of a forward pass, one bar a layer."""
    rows = results["parts"]
    parts = list(dict.fromkeys(part for row in rows for part, share in row["part_shares"].items() if share >= 0.005))
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for part in parts:
        widths = [row["part_shares"].get(part, 0.0) for row in rows]
        axes.barh(range(len(rows)), widths, left=left, label=part, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [f"{r['shape']}\n{r['arm']}, T {r['length']}" for r in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of a training forward pass")
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return _save(figure, path)


def plot_decode(results: dict[str, Any], path: Path) -> Path:
    """Latency of a step against the context."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    series = list(dict.fromkeys((r["shape"], r["batch"]) for r in results["decode"]))
    for number, (shape, batch) in enumerate(series):
        rows = [r for r in results["decode"] if (r["shape"], r["batch"]) == (shape, batch)]
        for key, line in (("graph", "o-"), ("eager", "x:")):
            timed = [(r["context"], 1e3 * r[key]["median"]) for r in rows if r[key]]
            if timed:
                label = f"{shape}, batch {batch}, {key}"
                axes.plot(*zip(*timed, strict=True), line, color=f"C{number}", label=label, markersize=4)
    _logarithmic(axes, sorted({r["context"] for r in results["decode"]}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("microseconds a step and layer")
    axes.legend(fontsize=8)
    return _save(figure, path)


def plot_training(results: dict[str, Any], path: Path) -> Path:
    """Tokens a second of every model and memory, with and without recomputation, at each context."""
    rows = [record for record in results["steps"] if record["status"] == "ok"]
    names = list(dict.fromkeys((r["model"], r["memory"]) for r in rows))
    bars = list(dict.fromkeys((r["context"], r["recompute"]) for r in rows))
    figure = Figure(figsize=(9, 1.5 + 0.7 * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(bars)
    for number, (context, recompute) in enumerate(bars):
        speeds = {
            (r["model"], r["memory"]): r["tokens_per_second"]["median"]
            for r in rows
            if (r["context"], r["recompute"]) == (context, recompute)
        }
        places = [place + (number - len(bars) / 2 + 0.5) * height for place in range(len(names))]
        label = f"T {context}, {'recomputing' if recompute else 'keeping activations'}"
        axes.barh(places, [speeds.get(name, 0.0) for name in names], height=0.9 * height, label=label)
    axes.set_yticks(range(len(names)), [f"{model}\n{memory}" for model, memory in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens a second")
    axes.legend(fontsize=8)
    return _save(figure, path)


def _logarithmic(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{t // 1024}K" if t >= 1024 else str(t) for t in ticks])
    axes.grid(alpha=0.25)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _page(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
