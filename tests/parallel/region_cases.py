"""Every crossing of regions.py beside one process that holds all ranks' tensors, and what a rank makes of it.

A case's ranks compute one loss: a weighted sum over sin(output), weights of each rank's own, or the same weights
everywhere where the outputs are equal and the loss counts once.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from dla_train.parallel import regions
from dla_train.parallel.axes import Axes, Axis

Tensors = list[Tensor]
"""One tensor per rank."""
SHAPE = (4, 8, 4)
"""Of every rank's input; 2 and 4 ranks divide each dimension."""


@dataclass(frozen=True)
class Case:
    """One crossing."""

    apply: Callable[[Tensor, Axis], Tensor]
    whole: Callable[[Tensors], Tensors]
    """The outputs of all ranks, from the inputs of all ranks."""
    equal_inputs: bool = False
    """Every rank holds the same tensor, which is one variable."""
    one_loss: bool = False
    """Outputs are equal, and all ranks compute the same loss, which counts once."""


def _everywhere(value: Callable[[Tensors], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda xs: [value(xs)] * len(xs)


def _added(xs: Tensors) -> Tensor:
    return torch.stack(xs).sum(0)


def _own_slices(xs: Tensors, dim: int) -> Tensors:
    return [x.chunk(len(xs), dim)[rank] for rank, x in enumerate(xs)]


def _exchanged(xs: Tensors, split_dim: int, join_dim: int) -> Tensors:
    return [torch.cat([x.chunk(len(xs), split_dim)[rank] for x in xs], join_dim) for rank in range(len(xs))]


def _cases() -> dict[str, Case]:
    cases = {
        "copy_to": Case(regions.copy_to, lambda xs: xs, equal_inputs=True),
        "reduce_from": Case(regions.reduce_from, _everywhere(_added), one_loss=True),
        "total": Case(regions.total, _everywhere(_added)),
    }
    for dim in (0, 1, -1):
        joined = _everywhere(lambda xs, d=dim: torch.cat(xs, d))
        cases |= {
            f"gather_along {dim}": Case(lambda x, axis, d=dim: regions.gather_along(x, axis, d), joined),
            f"reduce_scatter_along {dim}": Case(
                lambda x, axis, d=dim: regions.reduce_scatter_along(x, axis, d),
                lambda xs, d=dim: _own_slices([_added(xs)] * len(xs), d),
            ),
        }
    for dims in ((0, 1), (1, 0), (1, 2), (-1, -2), (2, 0)):
        cases[f"exchange {dims[0]} {dims[1]}"] = Case(
            lambda x, axis, d=dims: regions.exchange(x, axis, *d), lambda xs, d=dims: _exchanged(xs, *d)
        )
    return cases


CASES = _cases()
LAYOUTS = ("contiguous", "strided", "expanded")
"""How inputs and gradients lie in memory: plainly; with time outermost; a gradient that is one number, expanded."""


def input_of(case: Case, rank: int) -> Tensor:
    """The input of a rank, float64."""
    return _normal(SHAPE, 0 if case.equal_inputs else rank)


def loss_of(case: Case, output: Tensor, rank: int, layout: str) -> Tensor:
    """What a rank adds to the loss."""
    if layout == "expanded":
        return output.sum()
    weights = _normal(output.shape, 100 if case.one_loss else 100 + rank).to(output.dtype)
    if layout == "strided":
        output, weights = output.transpose(0, -1), weights.transpose(0, -1)
    return (weights * output.sin()).sum()


def direction(case: Case, rank: int) -> Tensor:
    """Along which the gradient of a rank's input is differentiated once more, float64."""
    return _normal(SHAPE, 200 if case.equal_inputs else 200 + rank)


def whole_loss(case: Case, inputs: Tensors, layout: str) -> Tensor:
    """The loss of all ranks together, in one process."""
    losses = [loss_of(case, output, rank, layout) for rank, output in enumerate(case.whole(inputs))]
    return losses[0] if case.one_loss else torch.stack(losses).sum()


def expected(name: str, ranks: int, layout: str) -> list[dict[str, Tensor]]:
    """What `cross` must find on each rank, float64, by plain autograd over the tensors of all ranks."""
    case = CASES[name]
    variables = [input_of(case, rank).requires_grad_() for rank in range(1 if case.equal_inputs else ranks)]
    inputs = variables * ranks if case.equal_inputs else variables
    gradients = torch.autograd.grad(whole_loss(case, inputs, layout), variables, create_graph=True)
    slope = torch.stack([(g * direction(case, rank)).sum() for rank, g in enumerate(gradients)]).sum()
    seconds = gradients if layout == "expanded" else torch.autograd.grad(slope, variables)
    found = []
    for rank, output in enumerate(case.whole(inputs)):
        own = 0 if case.equal_inputs else rank
        of_rank = {"output": output, "gradient": gradients[own], "second": seconds[own], "input": inputs[rank]}
        found.append({key: value.detach() for key, value in of_rank.items()})
    return found


def cross(axes: Axes, name: str, layout: str, dtype: str, plant: str) -> dict[str, Tensor]:
    """A rank's output, gradient, second derivative along `direction`, and input afterwards; `plant`: of `PLANTS`."""
    axis, case = Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), CASES[name]
    x = input_of(case, axis.rank).to(getattr(torch, dtype))
    if layout == "strided":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    x.requires_grad_()
    with planted(plant):
        output = case.apply(x, axis)
        loss = loss_of(case, output, axis.rank, layout)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        found = {"output": output.detach(), "gradient": gradient.detach()}
        if layout != "expanded":
            slope = (gradient * direction(case, axis.rank).to(x.dtype)).sum()
            (found["second"],) = torch.autograd.grad(slope, x)
    return found | {"input": x.detach()}


PLANTS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "no sum": ("_sum", lambda x, axis: x.clone()),
    "no sum before the slice": ("_sum_slice", lambda x, axis, dim: x.chunk(axis.size, dim)[axis.rank].clone()),
    "own part repeated": ("_join", lambda x, axis, dim: torch.cat([x] * axis.size, dim)),
    "nothing exchanged": (
        "_swap",
        lambda x, axis, split_dim, join_dim: torch.cat(x.chunk(axis.size, split_dim), join_dim),
    ),
}
"""Bugs by name: the move of regions.py that is replaced, and by what."""


def planted(name: str) -> AbstractContextManager[object]:
    """A context in which the bug is there; the empty name is none."""
    return patch.object(regions, *PLANTS[name]) if name else nullcontext()


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def imports_megatron(axes: Axes) -> dict[str, float]:
    """Whether this process has imported megatron."""
    return {"megatron": float("megatron" in sys.modules)}
