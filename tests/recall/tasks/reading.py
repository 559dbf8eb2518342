"""Rows of tasks read token by token in plain Python: what each position should answer by what came before it."""

from collections.abc import Iterable

from dla_train.recall.tasks.task import IGNORED, RecallBatch


def rows_of(batch: RecallBatch) -> list[tuple[list, list[int]]]:
    """Inputs and targets of every row, as lists."""
    return list(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True))


def asked(targets: list[int]) -> list[int]:
    """Positions with a target."""
    return [position for position, target in enumerate(targets) if target != IGNORED]


def last_writes(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """The newest value of each key."""
    return dict(pairs)
