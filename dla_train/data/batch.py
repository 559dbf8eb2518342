"""Micro-batches: packed rows as the tensors a model takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dla_train.data.errors import DataError
from dla_train.data.packing import IGNORED_TARGET, PackedRows


@dataclass(frozen=True)
class Batch:
    """One micro-batch of b rows.

    tokens [b, T] int64; targets [b, T] int64, -100 where the next token is another document's first;
    cu_seqlens [M+1] int32, document offsets into the flattened b*T tokens, row edges included.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor


def micro_batches(
    packed: PackedRows, rows: int, counted: NDArray[np.bool_] | None = None, *, pin_memory: bool = False
) -> list[Batch]:
    """`packed` in micro-batches of `rows` rows; the targets of rows that are not `counted` are all -100.

    pin_memory: in page-locked memory, from which a copy to a CUDA device does not wait.
    """
    batches = []
    for begin in range(0, len(packed.tokens), rows):
        part = PackedRows(packed.tokens[begin : begin + rows], packed.starts[begin : begin + rows])
        targets = part.targets()
        if counted is not None:
            targets[~counted[begin : begin + rows]] = IGNORED_TARGET
        arrays = (np.ascontiguousarray(part.tokens[:, :-1]), targets, part.cu_seqlens())
        tensors = [torch.from_numpy(array) for array in arrays]
        batches.append(Batch(*(tensor.pin_memory() for tensor in tensors) if pin_memory else tensors))
    return batches


def check_share(global_batch_rows: int, rank: int, world: int, micro_batch_rows: int) -> None:
    """Raise DataError unless a global batch divides into `world` ranks of whole micro-batches, `rank` one of them."""
    if world < 1 or micro_batch_rows < 1 or global_batch_rows % (world * micro_batch_rows):
        raise DataError(
            f"train.global_batch_rows={global_batch_rows} is not divisible by data-parallel ranks ({world}) x "
            f"train.micro_batch_rows={micro_batch_rows}"
        )
    if not 0 <= rank < world:
        raise DataError(f"rank {rank} is not in a data-parallel group of {world}")
