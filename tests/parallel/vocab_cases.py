"""A small vocabulary, whole and divided over ranks: what a rank finds for lookup and loss."""

import torch
import torch.distributed as dist
from torch import Tensor

from dla_train.parallel.axes import Axes, Axis
from dla_train.parallel.vocab import IGNORED, embed, padded_vocab, vocab_parallel_loss

VOCAB, WIDTH, BATCH, TIME = 300, 6, 3, 8
"""Padded to 512 rows: padding begins on rank 1 of 2; on rank 2 of 4, where rank 3 holds nothing else."""
LOSS_WEIGHTS = (0.7, 1.3)
"""Of nats and z-loss in the loss that is differentiated, so that neither gradient is left out."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def token_ids(seed: int) -> Tensor:
    """[B, T] of the whole vocabulary, first and last row included."""
    ids = torch.randint(0, VOCAB, (BATCH, TIME), generator=torch.Generator().manual_seed(seed))
    ids[0, :2] = torch.tensor([0, VOCAB - 1])
    return ids


def targets() -> Tensor:
    """[B, T] with some ignored."""
    return token_ids(1).masked_fill(normal(BATCH, TIME, seed=2) > 0.8, IGNORED)


def everyone() -> Axis:
    return Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def shard(whole: Tensor, axis: Axis, dim: int, padding: float) -> Tensor:
    """This rank's rows or columns of a vocabulary, behind which `padding` stands."""
    padded = padded_vocab(VOCAB, axis.size)
    filling = whole.new_full((*whole.shape[:dim], padded - VOCAB, *whole.shape[dim + 1 :]), padding)
    return torch.cat([whole, filling], dim).chunk(axis.size, dim)[axis.rank].clone()


def lookup(axes: Axes, scatter_time: bool, dtype: str) -> dict[str, Tensor]:
    """The embedding of the tokens in `dtype` and the gradient of this rank's rows under `lookup_loss`."""
    axis = everyone()
    weight = shard(normal(VOCAB, WIDTH, seed=0).float(), axis, 0, padding=1e4).requires_grad_()
    found = embed(token_ids(1), weight, axis, VOCAB, dtype=getattr(torch, dtype), scatter_time=scatter_time)
    scale = normal(BATCH, TIME, WIDTH, seed=3).to(found.dtype)
    (found * (scale.chunk(axis.size, 1)[axis.rank] if scatter_time else scale)).sum().backward()
    return {"output": found.detach(), "gradient": weight.grad}


def logits(kind: str) -> Tensor:
    """[B, T, V] in the dtype or of the kind named."""
    values = normal(BATCH, TIME, VOCAB, seed=4) * 3
    if kind == "huge":
        return values.float() * 1e4
    return values.to(getattr(torch, kind))


def loss(axes: Axes, kind: str, z_loss: float) -> dict[str, Tensor]:
    """The three sums and the gradient of this rank's logits, whose padding is larger than every real one."""
    axis = everyone()
    local = shard(logits(kind), axis, 2, padding=1e6).requires_grad_()
    nats, partition, count = vocab_parallel_loss(local, targets(), axis, VOCAB, z_loss)
    (LOSS_WEIGHTS[0] * nats + LOSS_WEIGHTS[1] * partition).backward()
    return {"sums": torch.stack([nats, partition, count]).detach(), "gradient": local.grad}


def loss_of_nan(axes: Axes) -> dict[str, float]:
    """The nats where one logit of the last rank that holds any is not a number."""
    axis, whole = everyone(), logits("float32")
    whole[0, 0, VOCAB - 1] = torch.nan
    return {"nats": float(vocab_parallel_loss(shard(whole, axis, 2, 0), targets(), axis, VOCAB)[0])}


def outside(axes: Axes, token: int) -> dict[str, str]:
    """The errors of a lookup and of a loss with one token outside the vocabulary."""
    axis, wrong = everyone(), token_ids(1)
    wrong[1, 1] = token
    errors = {}
    try:
        embed(wrong, shard(normal(VOCAB, WIDTH, seed=0), axis, 0, 0), axis, VOCAB)
    except IndexError as error:
        errors["lookup"] = str(error)
    try:
        vocab_parallel_loss(shard(logits("float32"), axis, 2, 0), wrong, axis, VOCAB)
    except RuntimeError as error:
        errors["loss"] = str(error)
    return errors
