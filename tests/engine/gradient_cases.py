"""What ranks see of their summed gradients, called on every rank by tests/parallel/ranks.py."""

import torch
import torch.distributed as dist
from torch import nn

from dla_train.engine import gradients
from dla_train.engine.gradients import GradientSum


def summed(axes, unused=False):
    """Two micro-batches through four of five layers, twice: what is wrong with the sums, and how many were early.

    unused: the third layer takes no part in the second step on rank 1.
    """
    gradients.BUCKET_ELEMENTS = 12  # a bucket a layer: weights [3, 3] and biases [3]
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(5)])
    parameters = list(layers.parameters())
    total, wrong, early = GradientSum(parameters, axes.batch), [], []
    launched = dist.all_reduce

    def counted(*arguments, **options):
        early.append(not finishing)
        return launched(*arguments, **options)

    dist.all_reduce = counted
    for step in range(2):
        finishing = False
        for micro in range(2):
            if micro == 1:
                total.start()
            loss_of(
                layers, rows(step, micro, axes.batch.rank), unused and step == 1 and axes.batch.rank == 1
            ).backward()
        finishing = True
        total.finish()
        expected = [torch.zeros_like(p) for p in parameters]
        for rank in range(axes.batch.size):
            for micro in range(2):
                loss = loss_of(layers, rows(step, micro, rank), unused and step == 1 and rank == 1)
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                expected = [e if g is None else e + g for e, g in zip(expected, found, strict=True)]
        wrong += [
            f"step {step}, parameter {index}"
            for index, (p, e) in enumerate(zip(parameters, expected, strict=True))
            if not torch.allclose(p.grad, e, rtol=1e-5)
        ]
        total.clear()
        wrong += [f"step {step}: not cleared" for p in parameters if p.grad is None or p.grad.any()]
    dist.all_reduce = launched
    return {"wrong": "; ".join(wrong), "early": float(sum(early)), "late": float(len(early) - sum(early))}


def rows(step, micro, rank):
    """Other rows for every step, micro-batch and rank, small enough for tanh to have a slope."""
    return torch.linspace(-1, 1, 6).view(2, 3) * (1 + micro + 2 * step + 4 * rank) / 8


def loss_of(layers, x, skip):
    """Of all layers but the first, which nobody uses; `skip` leaves out the third."""
    for index, layer in enumerate(layers[1:], 1):
        x = x if skip and index == 2 else layer(x).tanh()
    return x.square().sum()
