"""A look into the memories of a model in one training step: gathered in its first micro-batch, read after the step.

Looking changes nothing of the training: no gradient, no random number, no plan made anew. Each head's numbers are added
up where its memory is; ranks are joined when the look is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_train.models.language_model import LanguageModel
from dla_train.models.mixer import MemoryReading
from dla_train.parallel.mesh import Mesh
from dla_train.telemetry.counts import placed_heads
from dla_train.telemetry.sums import AGE_BINS, COLUMNS, SCORE_BINS, SCORE_WIDTH, head_sums, named
from dla_train.trackers import Histogram

RATIOS: dict[str, tuple[str, str]] = {
    "boundary_rate": ("boundaries", "decisions"),
    "score": ("score", "decisions"),
    "live_slots": ("slots", "samples"),
    "slot_tokens": ("slot_tokens", "slots"),
    "merge_rate": ("merges", "samples"),
    "merge_age_tokens": ("merge_age", "merges"),
    "read_entropy": ("entropy", "samples"),
    "read_evenness": ("entropy", "most_entropy"),
    "read_open_share": ("open_share", "samples"),
    "gate_distance": ("gate_distance", "gates"),
}
"""Numbers of a look, each a sum over another (docs/diagnostics.md); one without anything counted is left out."""
SETTINGS = ("tau", "gain", "sharpness")
"""What a head has rather than does: a number of the reading each, where its policy and read form have it."""
AGE_EDGES = [2.0**b for b in range(AGE_BINS + 1)]
EDGES: dict[str, list[float]] = {
    "score_histogram": [round(SCORE_WIDTH * b, 2) for b in range(SCORE_BINS + 1)],
    "slot_tokens_histogram": AGE_EDGES,
    "merge_age_histogram": AGE_EDGES,
    "read_share_by_age": AGE_EDGES,
}
"""Histograms for the trackers, and the edges of their bins."""


@dataclass(frozen=True)
class Looked:
    """What a look found."""

    numbers: dict[str, float]
    """For the trackers: of all layers, and of each."""
    histograms: dict[str, Histogram]
    """For the trackers: of each layer, where it counted anything."""
    heads: dict[str, Any]
    """Detail by head, for a file."""


class MemoryLook:
    """One look: an `Observer` of forward passes, then numbers."""

    def __init__(self, model: LanguageModel, mesh: Mesh) -> None:
        self._mesh = mesh
        heads = model.model_config.num_heads // mesh.axes.tensor.size
        size = (model.model_config.num_layers, heads, COLUMNS)
        self._sums = torch.zeros(size, dtype=torch.float64, device=mesh.device)
        self._settings = torch.zeros_like(self._sums[..., : len(SETTINGS)])
        memory = model.memory_config
        has = {"tau": memory.policy == "dla"} | dict.fromkeys(("gain", "sharpness"), memory.routes)
        self._has = [name for name in SETTINGS if has[name]]

    def __call__(self, layer: int, reading: MemoryReading) -> None:
        """Add what a layer's memory did in a forward."""
        found = head_sums(reading)
        own = slice(reading.first_head, reading.first_head + len(found))
        self._sums[layer, own] += found
        for column, name in enumerate(SETTINGS):
            value: Tensor | None = getattr(reading, name)
            if value is not None:
                self._settings[layer, own, column] = value.double()

    def read(self) -> Looked:
        """What was found, the same on every rank. Collective."""
        axes = self._mesh.axes
        found = self._mesh.sum(placed_heads(torch.cat([self._sums, self._settings], dim=-1), axes.tensor)).cpu()
        sums, settings = found.split([COLUMNS, len(SETTINGS)], dim=-1)
        values = {name: settings[..., SETTINGS.index(name)] / axes.data.size for name in self._has}
        return Looked(numbers(sums, values), histograms(sums, values), detail(sums, values))


def numbers(sums: Tensor, settings: Mapping[str, Tensor]) -> dict[str, float]:
    """Flat numbers of sums [layers, H, COLUMNS] and settings [layers, H] by name: of all layers, then of each layer."""
    flat: dict[str, float] = {}
    of_layers = named(sums.sum(1))
    for name, (part, whole) in RATIOS.items():
        if name == "score" and "tau" not in settings:
            continue
        total = float(of_layers[whole].sum())
        if total:
            flat[f"memory/{name}"] = float(of_layers[part].sum()) / total
        for layer, (p, w) in enumerate(zip(of_layers[part].tolist(), of_layers[whole].tolist(), strict=True)):
            flat |= {f"memory/{name}/layer_{layer}": p / w} if w else {}
    for name, values in settings.items():
        flat[f"memory/{name}"] = float(values.mean())
        flat |= {f"memory/{name}/layer_{layer}": float(row.mean()) for layer, row in enumerate(values)}
    return flat


def histograms(sums: Tensor, settings: Mapping[str, Tensor]) -> dict[str, Histogram]:
    """Of each layer, over its heads, of the arguments of `numbers`; those that count nothing are left out."""
    of_layers = named(sums.sum(1))
    found: dict[str, Histogram] = {}
    for name, edges in EDGES.items():
        if name == "score_histogram" and "tau" not in settings:
            continue
        for layer, counts in enumerate(of_layers[name].tolist()):
            found |= {f"memory/{name}/layer_{layer}": Histogram(edges, counts)} if any(counts) else {}
    return found


def detail(sums: Tensor, settings: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same for every head, and histograms, as plain values; with the edges of the histograms' bins."""
    parts = named(sums)
    heads = []
    for layer, head in itertools.product(range(sums.shape[0]), range(sums.shape[1])):
        own = {name: part[layer, head] for name, part in parts.items()}
        record: dict[str, Any] = {"layer": layer, "head": head}
        record |= {name: _short(float(values[layer, head])) for name, values in settings.items()}
        record |= {name: _short(float(own[p] / own[w])) for name, (p, w) in RATIOS.items() if own[w]}
        record |= {name: [_short(x) for x in own[name].tolist()] for name in EDGES if name != "read_share_by_age"}
        shares = own["read_share_by_age"] / own["samples"].clamp_min(1)
        record["read_share_by_age"] = [_short(x) for x in shares.tolist()]
        heads.append(record)
    bins = {"score_bin_width": SCORE_WIDTH, "age_bins_from_tokens": [2**b for b in range(AGE_BINS)]}
    return {**bins, "heads": heads}


def _short(value: float) -> float:
    """Five digits, whole numbers as such: a file of every head should stay small."""
    return int(value) if value == int(value) else float(f"{value:.5g}")
