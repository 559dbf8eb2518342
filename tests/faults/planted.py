"""Faults planted in a rank's process, before it begins to train."""

import errno
import time
from typing import Any

import torch

from dla_train.checkpoint import saving
from dla_train.loop import Loop


def at_step(step: int, what: Any) -> None:
    """Call `what(loop)` once, at the begin of optimizer step `step` of this process."""
    original = Loop._train_step

    def train_step(loop: Loop, done: int, **options: Any) -> Any:
        if done + 1 == step and not getattr(at_step, "done", False):
            at_step.done = True  # type: ignore[attr-defined]
            what(loop)
        return original(loop, done, **options)

    Loop._train_step = train_step  # type: ignore[method-assign]


def hang(step: int) -> None:
    """Sleep for ever in step `step`."""
    at_step(step, lambda loop: time.sleep(3600))


def loss_not_finite(step: int) -> None:
    """The loss of one micro-batch of step `step` is NaN, once."""

    def plant(loop: Loop) -> None:
        original = Loop._losses

        def losses(self: Loop, *arguments: Any) -> Any:
            Loop._losses = original  # type: ignore[method-assign]
            nats, partition = original(self, *arguments)
            return nats * float("nan"), partition

        Loop._losses = losses  # type: ignore[method-assign]

    at_step(step, plant)


def gradient_not_finite(step: int) -> None:
    """One gradient of step `step` is infinite in one place, once, on this rank."""

    def plant(loop: Loop) -> None:
        parameter = next(iter(loop.engine.module.parameters()))
        hook = parameter.register_hook(lambda gradient: spoilt(gradient))

        def spoilt(gradient: torch.Tensor) -> torch.Tensor:
            hook.remove()
            changed = gradient.clone()
            changed.view(-1)[0] = float("inf")
            return changed

    at_step(step, plant)


def weight_not_finite(step: int) -> None:
    """A weight of this rank is NaN from step `step` on, as after a flipped bit in memory."""

    def plant(loop: Loop) -> None:
        with torch.no_grad():
            weight = next(p for name, p in loop.engine.module.named_parameters() if "mlp" in name)
            getattr(weight, "ds_tensor", weight).view(-1)[0] = float("nan")  # ZeRO 3 keeps a part of it there

    at_step(step, plant)


def disk_full(times: int) -> None:
    """The first `times` saves of this process find no room."""
    original, left = saving.write_tensor_files, [times]

    def write(*arguments: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    saving.write_tensor_files = write


FAULTS = {
    "hang": hang,
    "loss": loss_not_finite,
    "gradient": gradient_not_finite,
    "weight": weight_not_finite,
    "disk": disk_full,
}
