"""The loss curve of a run, from its metrics.jsonl: training and held-out loss, reference levels, and where it
resumed."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from dla_train.trackers import read_lines


def plot_loss_curve(
    metrics: Path,
    output: Path,
    *,
    title: str,
    levels: dict[str, float] | None = None,
    resumed_at: list[int] | None = None,
) -> None:
    """Write a PNG of loss (nats per token) against optimizer steps.

    levels: horizontal reference lines by label, e.g. the unigram entropy. Raises ValueError where `metrics` has no
    loss.
    """
    lines = read_lines(metrics)
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    if not training:
        raise ValueError(f"{metrics} has no training loss to plot; train first, or check the path")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*training, strict=True), color="tab:blue", linewidth=1.2, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", color="tab:red", markersize=5, label="held out")
        axes.annotate(f"{held_out[-1][1]:.3f}", held_out[-1], xytext=(0, 8), textcoords="offset points", ha="right")
    for number, (label, level) in enumerate((levels or {}).items()):
        axes.axhline(
            level, color="0.4", linestyle=("--", ":", "-.")[number % 3], linewidth=1, label=f"{label} {level:.2f}"
        )
    for number, step in enumerate(resumed_at or []):
        axes.axvline(step, color="0.75", linewidth=1, label="resumed in a new process" if number == 0 else None)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
