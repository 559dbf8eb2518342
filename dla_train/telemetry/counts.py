"""Counts of every step of training: boundary rate, live slots, tau.

Counts are added up on each rank, without a device synchronisation, and reduced over the ranks only where they are read:
at log lines, or at every step where the counts steer tau.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dla_train.models.language_model import LanguageModel
from dla_train.models.memory_reads import Tau
from dla_train.parallel.axes import Axis
from dla_train.parallel.mesh import Mesh
from dla_train.telemetry.collapse import CollapseWatch


class MemoryTelemetry:
    """Counts of one model between two log lines."""

    def __init__(self, model: LanguageModel, mesh: Mesh) -> None:
        self._model = model
        self._mesh = mesh
        self._steers_tau = model.memory_config.policy == "dla" and model.memory_config.tau_control == "rate"
        self._counts: Tensor | None = None
        self._collapse = CollapseWatch()

    def after_step(self) -> None:
        """Take the counts of this step's forward passes; move a controlled tau by those of all ranks."""
        counts = self._take()
        if self._steers_tau:
            self._model.control_tau(self._mesh.sum(counts, self._mesh.axes.batch))

    def drop(self) -> None:
        """Forget what was counted since the last step, e.g. in a validation."""
        self._model.reset_memory_statistics()

    def read(self) -> dict[str, float]:
        """Boundary rate, mean live slots and mean tau since the last call, over all ranks; {} without a memory."""
        if self._counts is None:
            return {}
        counts = self._mesh.sum(placed_heads(self._counts, self._mesh.axes.tensor)).cpu()
        self._counts = None
        boundaries, tokens, live_slots = counts.sum(dim=(0, 1)).tolist()
        if tokens == 0:
            return {}
        numbers = {"boundary_rate": boundaries / tokens, "live_slots": live_slots / tokens}
        thresholds = [module().detach().mean() for module in self._model.modules() if isinstance(module, Tau)]
        if thresholds:
            numbers["tau"] = float(self._mesh.sum(torch.stack(thresholds).mean())) / self._mesh.size
            self._collapse.watch(counts)
        return numbers

    def _take(self) -> Tensor:
        counts = self._model.memory_statistics()
        self._model.reset_memory_statistics()
        self._counts = counts if self._counts is None else self._counts + counts
        return counts


def placed_heads(values: Tensor, tensor: Axis) -> Tensor:
    """[layers, heads of one tensor rank, n] -> [layers, all heads, n], zero for the heads of other tensor ranks."""
    whole = values.new_zeros(values.shape[0], values.shape[1] * tensor.size, values.shape[2])
    whole.chunk(tensor.size, dim=1)[tensor.rank].copy_(values)
    return whole
