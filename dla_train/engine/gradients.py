"""Gradients summed over ranks while backward is still running, and their global norm.

Gradients live in flat buckets that parameters' `.grad` are views of, filled in the order in which backward makes them.
A bucket is summed as soon as its last gradient is there, so that communication hides behind the rest of backward,
without a copy and without memory beyond the gradients themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dla_train.parallel.axes import Axis

BUCKET_ELEMENTS = 2**24
"""Gradient elements summed at once (64 MiB): enough for the full rate of a network, few enough to start early."""


class GradientSum:
    """The gradients of `parameters`, summed over `axis` in the step's last backward pass."""

    def __init__(self, parameters: Iterable[nn.Parameter], axis: Axis) -> None:
        self._group = axis.process_group()
        self._buckets = [_Bucket(part) for part in _runs(reversed(list(parameters)))]
        self._launched = len(self._buckets)  # none is to be summed before `start`
        held = weakref.ref(self)  # a parameter's hooks lie where the collector does not look: a cycle would never end
        for index, bucket in enumerate(self._buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(_made, held, index))

    def start(self) -> None:
        """The next backward pass is the step's last."""
        self._launched = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """Sum what is left (a gradient that was not made counts as zero, on every rank), and wait for all sums."""
        while self._launched < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            bucket.wait()

    def clear(self) -> None:
        """Zero every gradient, in place."""
        for bucket in self._buckets:
            bucket.flat.zero_()

    def made(self, index: int) -> None:
        """Launch, in the one order that is the same on every rank, the buckets that are complete.

        `index` is the bucket in which a gradient was just made.
        """
        self._buckets[index].missing -= 1
        while self._launched < len(self._buckets) and self._buckets[self._launched].missing == 0:
            self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._launched]
        bucket.sum = dist.all_reduce(bucket.flat, group=self._group, async_op=True)
        self._launched += 1


def _made(held: weakref.ref[GradientSum], index: int, _: Tensor) -> None:
    if (gradients := held()) is not None:
        gradients.made(index)


class _Bucket:
    """A flat run of gradients."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = 0
        self.sum: dist.Work | None = None
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        parts = self.flat.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def wait(self) -> None:
        if self.sum is not None:
            self.sum.wait()
            self.sum = None


def gradient_norm(parameters: Iterable[nn.Parameter], tensor: Axis) -> Tensor:
    """2-norm of the whole model's gradient: of divided parameters every tensor rank's part, of whole ones this rank's.

    Collective over `tensor`; a scalar, equal on its ranks.
    """
    made = [parameter for parameter in parameters if parameter.grad is not None]
    if tensor.size == 1:
        return nn.utils.get_total_norm([p.grad for p in made if p.grad is not None])
    divided = [p.grad for p in made if p.grad is not None and getattr(p, "tensor_model_parallel", False)]
    whole = [p.grad for p in made if p.grad is not None and not getattr(p, "tensor_model_parallel", False)]
    squares = nn.utils.get_total_norm(divided).square()
    dist.all_reduce(squares, group=tensor.process_group())
    return (squares + nn.utils.get_total_norm(whole).square()).sqrt()


def _runs(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Consecutive parameters in lists of at most BUCKET_ELEMENTS, or of one."""
    runs: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not runs or size + parameter.numel() > BUCKET_ELEMENTS:
            runs.append([])
            size = 0
        runs[-1].append(parameter)
        size += parameter.numel()
    return runs
