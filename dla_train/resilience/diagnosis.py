"""Where numbers first went wrong: the rows of a step that was left out are computed once more, module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def first_not_finite(module: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> str:
    """The parameter, or else the first module in forward, or else in backward, with a number that is not finite.

    losses: compute the loss of each micro-batch. "" where everything is finite. Collective where the model is divided:
    every rank computes all losses, whatever it finds, and no gradient reaches the parameters.
    """
    found = [_parameters(module), *(_of_one(module, loss) for loss in losses)]
    return next((what for what in found if what), "")


def _parameters(module: nn.Module) -> str:
    """Names of this rank's parameters that are not finite; ZeRO stage 3 keeps its part of each in `ds_tensor`."""
    wrong = [name for name, p in module.named_parameters() if not _finite(getattr(p, "ds_tensor", p))]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"parameter {_short(wrong[0])}{more}" if wrong else ""


def _of_one(module: nn.Module, loss: Callable[[], Tensor]) -> str:
    forward: list[str] = []
    outputs: list[tuple[str, Tensor]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not _finite(tensor):
                    forward.append(name)
                if tensor.requires_grad:  # finite or not: every rank must go back through the same collectives
                    outputs.append((name, tensor))

        return hook

    hooks = [part.register_forward_hook(look(name)) for name, part in module.named_modules() if name]
    try:
        total = loss()
        made = [tensor for _, tensor in outputs]
        gradients = torch.autograd.grad(total, made, allow_unused=True) if made else ()
    finally:
        for hook in hooks:
            hook.remove()
    if forward:
        return f"forward of {_short(forward[0])}"
    if not _finite(total):
        return "the loss"
    late = [
        name
        for (name, _), gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and not _finite(gradient)
    ]
    return f"backward, first at the output of {_short(late[-1])}" if late else ""


def _tensors(output: Any) -> Iterator[Tensor]:
    """Floating-point tensors of a module's output."""
    parts = output if isinstance(output, (tuple, list)) else (output,)
    yield from (part for part in parts if isinstance(part, Tensor) and part.is_floating_point())


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def _short(name: str) -> str:
    """A name as checkpoints have it, without an engine's wrapper."""
    return name.removeprefix("module.")
