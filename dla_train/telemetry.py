"""What the memories of a model do during training: boundary rate, live slots, tau.

Counts are added up on each rank, without a device synchronisation, and reduced over the ranks only where they are read:
at log lines, or at every step where the counts steer tau.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from dla_train.models.language_model import LanguageModel
from dla_train.models.memory_reads import Tau
from dla_train.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

RARE, CONSTANT = 0.005, 0.99
"""Boundary rates beyond which a memory is as good as one slot, or one slot a token."""
PATIENCE = 100
"""Log lines in a row outside these bounds before the warning."""


class MemoryTelemetry:
    """Counts of one model between two log lines."""

    def __init__(self, model: LanguageModel, mesh: Mesh) -> None:
        self._model = model
        self._mesh = mesh
        self._steers_tau = model.memory_config.policy == "dla" and model.memory_config.tau_control == "rate"
        self._counts: Tensor | None = None
        self._extreme_lines = 0
        self._warned = False

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
        boundaries, tokens, live_slots = self._mesh.sum(self._counts).sum(dim=(0, 1)).tolist()
        self._counts = None
        if tokens == 0:
            return {}
        numbers = {"boundary_rate": boundaries / tokens, "live_slots": live_slots / tokens}
        thresholds = [module().detach().mean() for module in self._model.modules() if isinstance(module, Tau)]
        if thresholds:
            numbers["tau"] = float(self._mesh.sum(torch.stack(thresholds).mean())) / self._mesh.size
            self._watch(numbers["boundary_rate"])
        return numbers

    def _take(self) -> Tensor:
        counts = self._model.memory_statistics()
        self._model.reset_memory_statistics()
        self._counts = counts if self._counts is None else self._counts + counts
        return counts

    def _watch(self, rate: float) -> None:
        """Warn once when the boundary rate has long been extreme: the loss does not show a collapsed memory."""
        extreme = rate < RARE or rate > CONSTANT
        self._extreme_lines = self._extreme_lines + 1 if extreme else 0
        if self._extreme_lines >= PATIENCE and not self._warned:
            self._warned = True
            what = "hardly any token starts a slot" if rate < RARE else "nearly every token starts a slot"
            logger.warning(
                "boundary rate %.4f: for %d log lines %s; the memory is not used as meant. Move memory.tau, or use "
                "memory.tau_control=rate",
                rate,
                PATIENCE,
                what,
            )
