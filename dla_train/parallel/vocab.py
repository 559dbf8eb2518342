"""Embedding lookup and cross-entropy over a vocabulary whose rows are divided among the ranks of an axis.

Rank r of R holds rows [r n, (r + 1) n) of the embedding and the same columns of the logits, n = padded_vocab / R.
Padding lies behind the last real row; its logits count nothing and it receives no gradient, but its weights must be
finite (zeros): a product with a gradient of zero still reads them. Checkpoints hold the vocab_size real rows, so they
do not depend on the padding.

A token or target outside the vocabulary is an error on every rank, as it is on one: it is looked up out of range on
purpose (IndexError or RuntimeError on the CPU, a device-side assertion on CUDA), because the masks that make the
division work would otherwise turn it into a row of zeros. Nothing waits for the device to find out.

The loss is written out with its gradient (Megatron-LM's vocabulary-parallel cross-entropy, plus z-loss): it keeps the
logits in their own dtype and two numbers a token, where autograd would keep a float32 copy of the logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dla_train.parallel.axes import Axis
from dla_train.parallel.regions import reduce_from, reduce_scatter_along

IGNORED = -100
"""Target of a position that has none: what PyTorch's cross-entropy ignores; data/packing.py, without torch, too."""
ROWS_MULTIPLE = 128
"""Rows of a rank are a multiple of this: full tiles of the head's matrix product, as in Megatron-LM."""


def padded_vocab(vocab_size: int, ranks: int, multiple: int = ROWS_MULTIPLE) -> int:
    """Rows of an embedding divided over `ranks`: vocab_size rounded up to a multiple of ranks x `multiple`.

    One rank needs no padding and gets none, so a model that is not divided has exactly vocab_size rows.
    """
    if ranks == 1:
        return vocab_size
    step = ranks * multiple
    return -(-vocab_size // step) * step


def real_rows(rows: int, axis: Axis, vocab_size: int) -> tuple[int, int]:
    """(first row, real rows) of this rank's `rows` rows; the second is below `rows` where padding begins.

    Raises ValueError where the ranks together hold fewer rows than the vocabulary has.
    """
    if rows * axis.size < vocab_size:
        raise ValueError(
            f"{rows} rows on each of {axis.size} ranks do not hold vocab_size={vocab_size}; "
            f"give each {padded_vocab(vocab_size, axis.size) // axis.size} (padded_vocab / ranks)"
        )
    first = axis.rank * rows
    return first, min(max(vocab_size - first, 0), rows)


def embed(
    tokens: Tensor,
    local_weight: Tensor,
    axis: Axis,
    vocab_size: int,
    *,
    dtype: torch.dtype | None = None,
    scatter_time: bool = False,
) -> Tensor:
    """tokens [B, T] int64, equal on every rank; local_weight [rows, D] -> [B, T, D] in `dtype`, whole on every rank.

    dtype: default the weight's; the sum over ranks is exact in any, for all terms but one are zero. scatter_time: the
    rank's slice [B, T / R, D] along time instead (sequence parallel); gradients then arrive per slice and are joined.
    Raises ValueError for too few rows or, with scatter_time, T that R does not divide; IndexError for a token outside
    the vocabulary.
    """
    first, _ = real_rows(local_weight.shape[0], axis, vocab_size)
    if axis.size == 1:
        return F.embedding(tokens, local_weight).to(dtype or local_weight.dtype)
    row, here = _local_rows(tokens, first, local_weight.shape[0], vocab_size)
    part = F.embedding(row, local_weight).to(dtype or local_weight.dtype)
    part = part.masked_fill(~here.unsqueeze(-1), 0)
    return reduce_scatter_along(part, axis, dim=1) if scatter_time else reduce_from(part, axis)


def vocab_parallel_loss(
    local_logits: Tensor, targets: Tensor, axis: Axis, vocab_size: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of nats, sum of z-loss, count), scalars, equal on every rank; as models/loss.py's next_token_loss.

    local_logits [..., rows] of any float dtype; targets [...] int64, equal on every rank, IGNORED counts nothing. The
    second is `z_loss` * sum of log(Z)^2. Sums are float32 (float64 for float64 logits). The ranks compute one loss
    together: its gradient reaches each rank's logits complete, and the input of the head needs `copy_to` or
    `gather_along`. Raises ValueError for too few rows, RuntimeError for a target outside the vocabulary.
    """
    flat, wanted = local_logits.flatten(0, -2), targets.flatten()
    nats, partition, count = _CrossEntropy.apply(flat, wanted, axis, vocab_size, z_loss)
    return nats, partition, count


@torch.no_grad()
def vocab_parallel_nats(local_logits: Tensor, targets: Tensor, axis: Axis, vocab_size: int) -> Tensor:
    """Nats of every target, float32 like targets, 0 where one is IGNORED, equal on every rank; no gradient.

    Takes and raises what `vocab_parallel_loss` does.
    """
    return _target_nats(local_logits.flatten(0, -2), targets.flatten(), axis, vocab_size).nats.view(targets.shape)


class _Scored(NamedTuple):
    """What the ranks find out together about N targets."""

    nats: Tensor
    """[N], 0 where a target is IGNORED."""
    log_partition: Tensor
    """[N]."""
    counted: Tensor
    """[N] bool: whether there is a target."""
    column: Tensor
    """[N] the target's column of this rank's logits, 0 where it is another rank's."""
    here: Tensor
    """[N] bool: whether it lies in this rank's logits."""
    real: int
    """Columns of this rank that are no padding."""


def _target_nats(logits: Tensor, targets: Tensor, axis: Axis, vocab_size: int) -> _Scored:
    """Of logits [N, rows] and targets [N]; two all-reduces of N and 2 N numbers."""
    rows = logits.shape[-1]
    first, real = real_rows(rows, axis, vocab_size)
    wide = torch.promote_types(logits.dtype, torch.float32)
    counted = targets != IGNORED
    column, here = _local_rows(torch.where(counted, targets, 0), first, rows, vocab_size)
    here = here & counted
    largest = logits.new_full(targets.shape, -torch.inf, dtype=wide)
    if real:  # the last ranks of a small vocabulary hold padding only
        largest = logits[:, :real].amax(-1).to(wide)
    if axis.size > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.process_group())
    # bfloat16 minus float32 is float32, without a float32 copy of the logits
    scale = (logits[:, :real] - largest.unsqueeze(-1)).exp_().sum(-1)
    score = torch.where(here, logits.gather(-1, column.unsqueeze(-1)).squeeze(-1) - largest, 0)
    sums = torch.stack([scale, score])
    if axis.size > 1:
        dist.all_reduce(sums, group=axis.process_group())
    log_scale = sums[0].log()
    return _Scored(torch.where(counted, log_scale - sums[1], 0), log_scale + largest, counted, column, here, real)


class _CrossEntropy(torch.autograd.Function):
    """The three sums of logits [N, rows] and targets [N]; two all-reduces of N and 2 N numbers, none backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, axis: Axis, vocab_size: int, z_loss: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = _target_nats(logits, targets, axis, vocab_size)
        nats, log_partition, counted = found.nats.sum(), found.log_partition, found.counted
        partition = torch.zeros_like(nats)
        if z_loss:
            partition = z_loss * torch.where(counted, log_partition, 0).square().sum()
        count = counted.sum().to(nats.dtype)
        ctx.save_for_backward(logits, found.column, found.here, counted, log_partition)
        ctx.real, ctx.z_loss = found.real, z_loss
        ctx.mark_non_differentiable(count)
        return nats, partition, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """d nats / d logit = softmax - one-hot; d log(Z)^2 / d logit = 2 log(Z) softmax; rows without a target: 0."""
        logits, column, here, counted, log_partition = ctx.saved_tensors
        of_nats, of_partition, _ = gradients
        padded = torch.zeros_like(logits)
        if ctx.real:
            share = (logits[:, : ctx.real] - log_partition.unsqueeze(-1)).exp_()
            share *= (counted * (of_nats + of_partition * 2 * ctx.z_loss * log_partition)).unsqueeze(-1)
            share.scatter_add_(-1, column.unsqueeze(-1), -(here * of_nats).unsqueeze(-1))
            padded[:, : ctx.real] = share
        return padded, None, None, None, None


def _local_rows(ids: Tensor, first: int, rows: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """ids -> (row on this rank, whether it lies here); 0 for another rank's, `rows` (out of range) for nobody's."""
    row = ids - first
    here = (row >= 0) & (row < rows)
    row = torch.where(here, row, 0)
    return torch.where((ids >= 0) & (ids < vocab_size), row, rows), here
