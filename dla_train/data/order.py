"""The order of documents and rows: pure functions of (seed, epoch), and where a step falls in it.

The decision a reader would ask about: the shuffle sorts a counter-based hash (SplitMix64, Steele, Lea and Flood 2014)
instead of calling a library generator, because NumPy keeps the right to change the stream of `Generator.permutation`
between versions, and a run resumed under another version must see the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_DOCUMENTS, _ROWS = 1, 2  # separate streams, so that documents and rows are shuffled independently


@dataclass(frozen=True)
class StepPosition:
    """Where a step's global batch lies: `epoch`, and the first of its rows in that epoch's row order."""

    epoch: int
    first_row: int


def document_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Permutation [count] int64 of the documents of one epoch."""
    return _shuffled(count, seed, epoch, _DOCUMENTS)


def row_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Permutation [count] int64 of the rows of one epoch."""
    return _shuffled(count, seed, epoch, _ROWS)


def locate_step(step: int, rows: int, global_batch_rows: int) -> StepPosition:
    """Epoch and first row of `step` (0-based); an epoch has rows // global_batch_rows steps, at least 1."""
    if step < 0:
        raise ValueError(f"step={step} is negative; steps count from 0")
    steps_per_epoch = rows // global_batch_rows
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    return StepPosition(epoch=epoch, first_row=step_in_epoch * global_batch_rows)


def _shuffled(count: int, seed: int, epoch: int, stream: int) -> NDArray[np.int64]:
    key = 0
    for part in (seed, epoch, stream):
        key = int(_mix(np.array([(key + (part & _MASK) + 1) * _GOLDEN & _MASK], dtype=np.uint64))[0])
    counters = np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    return np.argsort(_mix(counters)).astype(np.int64, copy=False)  # no two are equal: any sort gives this order


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, a bijection of 64-bit integers: distinct counters never tie."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
