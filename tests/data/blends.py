"""Blends of three small numbered corpora, for the tests of batches and of cursors."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dla_train.data.batch import Batch
from dla_train.data.blend import Phase
from dla_train.data.indexed import TokenFiles
from dla_train.data.loader import BatchSource
from dla_train.data.row_source import RowSource
from tests.data.conftest import numbered_files

FIRST = {"web": 1, "code": 100_001, "books": 200_001}
LENGTHS = {"web": (300, 11), "code": (120, 23), "books": (30, 70)}  # documents, mean length
Weights = dict[str, int]


def make_files(folder: Path) -> dict[str, TokenFiles]:
    return {
        name: numbered_files(folder, [1 + i * i * 7 % (2 * mean - 1) for i in range(count)], name, FIRST[name])
        for name, (count, mean) in LENGTHS.items()
    }


def make(
    files: dict[str, TokenFiles],
    *phases: tuple[int, Weights] | tuple[int, Weights, int],
    context: int = 16,
    rows: int = 12,
    seed: int = 7,
    packing: str = "concatenate",
    **options: Any,
) -> BatchSource:
    shape: dict[str, Any] = {"context_tokens": context, "global_batch_rows": rows, "seed": seed, "packing": packing}
    named = {name for phase in phases for name in phase[1]}
    sources = [RowSource(name, files[name], **shape) for name in sorted(named)]
    made = [
        Phase(phase[0], {n: Fraction(w) for n, w in phase[1].items() if w}, phase[2] if len(phase) > 2 else context)
        for phase in phases
    ]
    return BatchSource(sources, made, **shape, **options)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(getattr(a, part), getattr(b, part))
        for a, b in zip(one, other, strict=True)
        for part in ("tokens", "targets", "cu_seqlens")
    )


def tokens_of(batches: list[Batch]) -> np.ndarray:
    return torch.cat([batch.tokens.flatten() for batch in batches]).numpy()


def source_of(token: int) -> str:
    return max((name for name in FIRST if FIRST[name] <= token), key=FIRST.__getitem__)


PHASES: tuple[Any, ...] = (
    (0, {"web": 6, "code": 3}),
    (9, {"web": 2, "code": 0, "books": 1}),
    (15, {"books": 1, "web": 3}, 4),
)
