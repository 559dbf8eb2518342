"""Crossings between what every rank of an axis holds whole and what each holds in part, with their gradients.

Each crossing is a pair of moves, one for values and one for gradients, and the gradient's crossing is the same pair
turned round; so one autograd function serves all of them, any number of times differentiable. Over an axis of one
rank nothing happens: the input itself comes back. Which crossing is right follows from what its ranks hold:

| function             | value                        | gradient                 | the ranks then compute              |
|----------------------|------------------------------|--------------------------|-------------------------------------|
| copy_to              | as it is (equal everywhere)  | summed                   | different parts of the loss         |
| reduce_from          | summed                       | as it is                 | the same thing, counted once        |
| gather_along         | joined                       | summed, own slice        | different parts of the loss         |
| reduce_scatter_along | summed, own slice            | joined                   | different parts of the loss         |
| total                | summed                       | summed                   | different parts of the loss         |
| exchange             | sliced one way, joined other | the reverse              | different parts of the loss         |

The first four are Megatron-LM's (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2), `exchange` is
DeepSpeed-Ulysses' (Jacobs et al. 2023). megatron-core's own functions are not used because they allocate their
buffers on the current CUDA device, so that nothing could be tested without one; these run on CUDA with NCCL and on
the CPU with gloo by the same calls. Tensors must have the same shape on every rank of the axis; that is not checked,
since checking would communicate. Sums are made in the tensor's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dla_train.parallel.axes import Axis

Move = Callable[[Tensor], Tensor]

if hasattr(dist, "all_gather_single"):  # torch 2.13 renamed both and warns about the old names
    _all_gather, _reduce_scatter = dist.all_gather_single, dist.reduce_scatter_single
else:
    _all_gather, _reduce_scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """x, equal on every rank -> x; gradients are summed. Before ranks use x for different parts (a column split)."""
    return _cross(x, axis, _same, partial(_sum, axis=axis))


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's x, on every rank; gradients pass. After a row split: all ranks go on alike."""
    return _cross(x, axis, partial(_sum, axis=axis), _same)


def total(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's x, on every rank; gradients are summed too: each rank uses the sum in its own way."""
    return _cross(x, axis, partial(_sum, axis=axis), partial(_sum, axis=axis))


def gather_along(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """x [.., n, ..] -> [.., R n, ..], joined along `dim` in rank order, for different use; gradients are summed."""
    dim = _position(x, dim)
    return _cross(x, axis, partial(_join, axis=axis, dim=dim), partial(_sum_slice, axis=axis, dim=dim))


def reduce_scatter_along(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """x [.., R n, ..] -> [.., n, ..], own slice of the sum over ranks. Raises ValueError if R does not divide."""
    dim = _divisible(x, axis, dim, "reduce_scatter_along")
    return _cross(x, axis, partial(_sum_slice, axis=axis, dim=dim), partial(_join, axis=axis, dim=dim))


def exchange(x: Tensor, axis: Axis, split_dim: int, join_dim: int) -> Tensor:
    """x [.., R s, .., j, ..] -> [.., s, .., R j, ..]: whole along `split_dim` becomes whole along `join_dim`.

    Rank r gets slice r of every rank's `split_dim` and joins them along `join_dim` in rank order; each rank sends
    (R - 1) / R of x. Raises ValueError if R does not divide the split dimension, or if both dimensions are one.
    """
    split_dim, join_dim = _divisible(x, axis, split_dim, "exchange"), _position(x, join_dim)
    if split_dim == join_dim:
        raise ValueError(f"exchange: split_dim and join_dim are both {split_dim}; choose two different dims")
    there = partial(_swap, axis=axis, split_dim=split_dim, join_dim=join_dim)
    back = partial(_swap, axis=axis, split_dim=join_dim, join_dim=split_dim)
    return _cross(x, axis, there, back)


class _Crossing(torch.autograd.Function):
    """One move for values, another for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Move, back: Move) -> Tensor:
        ctx.there, ctx.back = there, back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Crossing.apply(gradients[0], ctx.back, ctx.there), None, None


def _cross(x: Tensor, axis: Axis, there: Move, back: Move) -> Tensor:
    crossed: Tensor = x if axis.size == 1 else _Crossing.apply(x, there, back)
    return crossed


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, axis: Axis) -> Tensor:
    summed = x.clone(memory_format=torch.contiguous_format)  # gradients arrive strided, or expanded from one number
    dist.all_reduce(summed, group=axis.process_group())
    return summed


def _join(x: Tensor, axis: Axis, dim: int) -> Tensor:
    joined = x.new_empty(axis.size * x.numel())  # flat: gloo takes no stacked output
    _all_gather(joined, x.contiguous().view(-1), group=axis.process_group())
    return joined.view(axis.size, *x.shape).movedim(0, dim).flatten(dim, dim + 1)


def _sum_slice(x: Tensor, axis: Axis, dim: int) -> Tensor:
    slices = _slices(x, axis, dim)
    share = torch.empty_like(slices[0])
    _reduce_scatter(share.view(-1), slices.view(-1), group=axis.process_group())
    return share


def _swap(x: Tensor, axis: Axis, split_dim: int, join_dim: int) -> Tensor:
    slices = _slices(x, axis, split_dim)
    received = torch.empty_like(slices)
    dist.all_to_all_single(received.view(-1), slices.view(-1), group=axis.process_group())
    return received.movedim(0, join_dim).flatten(join_dim, join_dim + 1)


def _slices(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """x [.., R n, ..] -> [R, .., n, ..], contiguous: slice r for rank r."""
    return x.unflatten(dim, (axis.size, -1)).movedim(dim, 0).contiguous()


def _position(x: Tensor, dim: int) -> int:
    """`dim` counted from the front. Raises IndexError where x has no such dimension."""
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"dim {dim} is not a dimension of shape {list(x.shape)}")
    return dim % x.dim()


def _divisible(x: Tensor, axis: Axis, dim: int, function: str) -> int:
    dim = _position(x, dim)
    if x.shape[dim] % axis.size:
        raise ValueError(
            f"{function}: dim {dim} of shape {list(x.shape)} has size {x.shape[dim]}, which {axis.size} ranks do not "
            f"divide; choose a multiple of {axis.size}"
        )
    return dim
