"""The state of a model and its AdamW under logical names: `model/<name>`, `optim/<name>/<moment>`.

Names are those of the model's parameters and persistent buffers, every tensor whole and unfused. Engines that keep
plain tensors use these functions as they are; one that divides its state brings the whole tensors together first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Per-parameter state of AdamW that a checkpoint holds."""


class LogicalState(Protocol):
    """Whoever holds such a state. Every method is collective: all ranks call it, in the same order."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor of the state, by logical name."""

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        """(logical name, whole tensor) one by one, the model's before the optimizer's.

        A tensor may be live storage and is valid until the next one.
        """

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Load every tensor of `shapes()` and continue as after `steps` optimizer steps."""


def parameter_of(name: str) -> str:
    """The parameter or buffer that a logical name of the state belongs to."""
    kind, rest = name.split("/", 1)
    return rest if kind == "model" else rest.rsplit("/", 1)[0]


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Persistent buffers (such as a controlled tau) under their logical names."""
    kept = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in kept:
            yield f"model/{name}", buffer


def module_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Persistent buffers and parameters; the tensors share the module's storage."""
    yield from persistent_buffers(module)
    for name, parameter in module.named_parameters():
        yield f"model/{name}", parameter.detach()


def moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Moments of every trained parameter, after at least one step; they share the optimizer's storage."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            for moment in MOMENTS:
                yield f"optim/{name}/{moment}", optimizer.state[parameter][moment]


def state_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that `module_tensors` and `moments` give, also before the first step."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module_tensors(module)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            shapes.update({f"optim/{name}/{moment}": tuple(parameter.shape) for moment in MOMENTS})
    return shapes


def load_module(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy parameters and buffers into the module, in place."""
    for name, tensor in module_tensors(module):
        tensor.copy_(state[name])


def load_moments(module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor], steps: int) -> None:
    """Give the optimizer copies of the moments, as after `steps` steps."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            loaded = {moment: state[f"optim/{name}/{moment}"].to(parameter.device, copy=True) for moment in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=parameter.device), **loaded}
