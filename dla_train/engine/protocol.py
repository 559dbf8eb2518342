"""What the trainer asks of an engine, whoever owns backward and step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dla_train.logical_state import LogicalState


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports."""

    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    applied: bool
    """Whether anything was updated: not where the norm is not finite. The same on every rank."""


class Engine(LogicalState, Protocol):
    """Backward and step of a model, beside its logical state. Every method is collective, but `close`."""

    module: Any
    """What to call for a forward pass: the model, or what passes everything on to it."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`. The losses of all micro-batches and ranks **sum** to the loss of the step.

        `last` marks the step's last micro-batch, where gradients are exchanged.
        """

    def step(self, lr: float) -> StepResult:
        """Clip, update at learning rate `lr`, and clear the gradients; one that is not finite changes nothing else."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, whole summed gradient) one by one, between the last backward and the step."""

    def close(self) -> None:
        """Let go of what would outlive the engine; it is not used afterwards. Not collective."""
