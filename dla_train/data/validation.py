"""Held-out batches: rows in file order, concatenated, the same for every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dla_train.data.batch import Batch, check_share, micro_batches
from dla_train.data.errors import CorpusTooSmallError
from dla_train.data.indexed import TokenFiles
from dla_train.data.packing import EpochLayout, row_count


class HeldOutSource:
    """Rows of `context_tokens` of held-out files. Raises CorpusTooSmallError if there is not one."""

    def __init__(self, files: TokenFiles, *, context_tokens: int, global_batch_rows: int) -> None:
        self.files = files
        self.context_tokens = context_tokens
        self.global_batch_rows = global_batch_rows
        self.rows = row_count(files.tokens, context_tokens)
        if not self.rows:
            raise CorpusTooSmallError(
                f"{', '.join(files.prefixes)} has {files.tokens} tokens = 0 rows of data.context_tokens="
                f"{context_tokens}, but a validation needs 1 row; use more held-out text or a shorter context"
            )

    def validation_batches(
        self, count: int, rank: int = 0, world: int = 1, micro_batch_rows: int = 1
    ) -> Iterator[list[Batch]]:
        """Up to `count` global batches in file order, each as this rank's micro-batches.

        If the rows end inside the last batch it is filled with repeated rows whose targets are all -100, so every
        rank makes the same number of equal micro-batches.
        """
        check_share(self.global_batch_rows, rank, world, micro_batch_rows)
        layout = EpochLayout(self.files, None, self.context_tokens)
        share = self.global_batch_rows // world
        for first in range(0, min(count * self.global_batch_rows, self.rows), self.global_batch_rows):
            rows = first + rank * share + np.arange(share)
            yield micro_batches(layout.cut(rows % self.rows), micro_batch_rows, rows < self.rows)
