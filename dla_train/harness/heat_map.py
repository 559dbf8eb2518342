"""Needles found by length and depth: the numbers (needles.npz) and the picture (needles.png).

A task that asks for several needles gives a point for each, at its own depth.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

ROWS = 10
"""Depths in the picture."""
COLUMNS = 3
"""Panels beside each other."""


def write_heat_map(output: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write needles.npz ({task}_length, _depth, _hit: an entry a needle) and needles.png into `output`."""
    found = _points(output, results)
    arrays = {f"{task}_{name}": array for task, points in found.items() for name, array in points.items()}
    np.savez(output / "needles.npz", allow_pickle=False, **arrays)
    lengths = sorted({int(length) for points in found.values() for length in points["length"]})
    shape = (-(-len(found) // COLUMNS), min(len(found), COLUMNS))
    figure = Figure(figsize=(4 * shape[1], 3.2 * shape[0]), layout="constrained")
    panels = list(figure.subplots(*shape, squeeze=False).flat)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    for axes, (task, points) in zip(panels, found.items(), strict=False):
        grid = shares(points["length"], points["depth"], points["hit"], lengths)
        image = axes.imshow(grid, vmin=0, vmax=1, aspect="auto", extent=(0, len(lengths), 100, 0))
        axes.set_xticks(np.arange(len(lengths)) + 0.5, [_short(length) for length in lengths])
        axes.set(title=task, xlabel="tokens", ylabel="depth (%)")
    figure.colorbar(image, ax=panels, label="needles found")
    figure.savefig(output / "needles.png", dpi=120)


def shares(length: np.ndarray, depth: np.ndarray, hit: np.ndarray, lengths: list[int]) -> np.ndarray:
    """[ROWS, lengths]: share of the needles found in each cell; nan where there was none."""
    grid = np.full((ROWS, len(lengths)), np.nan)
    row = np.minimum((depth * ROWS).astype(int), ROWS - 1)
    for i in range(ROWS):
        for j, tokens in enumerate(lengths):
            cell = hit[(row == i) & (length == tokens)]
            if cell.size:
                grid[i, j] = cell.mean()
    return grid


def _points(output: Path, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    rows: dict[str, list[tuple[int, float, bool]]] = {}
    for name, result in results.items():
        if result["length"] is None:
            continue
        written = (output / "units" / f"{name}.samples.jsonl").read_text(encoding="utf-8")
        for line in written.split("\n")[:-1]:  # an answer may hold U+2028 and other ends of lines that are none here
            sample = json.loads(line)
            points = zip(sample["depths"], sample["hits"], strict=True)
            rows.setdefault(result["task"], []).extend((result["length"], depth, hit) for depth, hit in points)
    names = ("length", "depth", "hit")
    return {
        task: {name: np.array(column) for name, column in zip(names, zip(*found, strict=True), strict=True)}
        for task, found in rows.items()
    }


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
