"""One source of a run: its rows in the order in which they are read, epoch after epoch.

A source is read by its own count of rows, whatever other sources do: row n of the source is row n % rows_per_epoch of a
shuffled epoch. Where an epoch's order comes from is order.py, how a row is made packing.py and best_fit.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from dla_train.data.best_fit import BestFit
from dla_train.data.errors import CorpusTooSmallError
from dla_train.data.indexed import TokenFiles
from dla_train.data.order import document_order, row_order
from dla_train.data.packing import EpochLayout, Layout, PackedRows, PackingReport, concatenation_report, row_count


@dataclass(frozen=True)
class Position:
    """How far a source has been read: `rows` in the whole run; the next one is `row` of `epoch`."""

    rows: int = 0
    epoch: int = 0
    row: int = 0


class RowSource:
    """Rows of `context_tokens` + 1 tokens of `files`.

    whole_batches: an epoch ends with the last of its rows that fills a global batch of `global_batch_rows`; other rows
    are left out every epoch. Raises CorpusTooSmallError if there is no row (`whole_batches`: no global batch).
    """

    def __init__(
        self,
        name: str,
        files: TokenFiles,
        *,
        context_tokens: int,
        global_batch_rows: int,
        seed: int,
        packing: str = "concatenate",
        whole_batches: bool = False,
    ) -> None:
        self.name, self.files, self.context_tokens, self.seed = name, files, context_tokens, seed
        self._best_fit = BestFit(files, context_tokens) if packing == "best_fit" else None
        self.rows = self._best_fit.rows if self._best_fit else row_count(files.tokens, context_tokens)
        """Rows that one pass over the files gives."""
        needed = global_batch_rows if whole_batches else 1
        if self.rows < needed:
            what = "one global batch" if whole_batches else "a source"
            raise CorpusTooSmallError(
                f"{', '.join(files.prefixes)} has {files.tokens} tokens = {self.rows} rows of "
                f"data.context_tokens={context_tokens}, but {what} needs {needed} row(s); use more text, a shorter "
                "data.context_tokens or a smaller train.global_batch_rows"
            )
        self.rows_per_epoch = self.rows - self.rows % needed
        """Rows of an epoch."""
        self._known = Position()
        self._epochs: dict[int, tuple[Layout, NDArray[np.integer]]] = {}
        self._lock = Lock()

    def go_on_from(self, known: Position) -> None:
        """Count from a position that an earlier start of the run reached."""
        self._known = known

    def position(self, rows: int) -> Position:
        """Where the source stands after `rows` rows of the run (not before the position it goes on from)."""
        known = self._known
        if rows < known.rows:
            raise ValueError(f"row {rows} of source {self.name} lies before row {known.rows}, where this start begins")
        epochs, row = divmod(known.row + rows - known.rows, self.rows_per_epoch)
        return Position(rows, known.epoch + epochs, row)

    def read(self, first: int, count: int) -> PackedRows:
        """Rows `first` to `first + count` of the run's rows of this source."""
        parts = []
        while count:
            position = self.position(first)
            layout, order = self._epoch(position.epoch)
            taken = min(count, self.rows_per_epoch - position.row)
            parts.append(layout.cut(order[position.row : position.row + taken].astype(np.int64)))
            first, count = first + taken, count - taken
        if len(parts) == 1:
            return parts[0]
        return PackedRows(np.concatenate([p.tokens for p in parts]), np.concatenate([p.starts for p in parts]))

    def report(self) -> PackingReport:
        """What packing does to this source in one epoch."""
        return self._best_fit.report() if self._best_fit else concatenation_report(self.files, self.context_tokens)

    def _epoch(self, epoch: int) -> tuple[Layout, NDArray[np.integer]]:
        """Layout and row order of an epoch; two are kept, for reading ahead over the edge."""
        with self._lock:
            if epoch not in self._epochs:
                if len(self._epochs) >= 2:
                    del self._epochs[min(self._epochs)]
                layout: Layout
                if self._best_fit:
                    layout = self._best_fit.epoch(self.seed, epoch)
                else:
                    documents = document_order(self.files.documents, self.seed, epoch)
                    layout = EpochLayout(self.files, documents, self.context_tokens)
                self._epochs[epoch] = (layout, row_order(self.rows, self.seed, epoch))
            return self._epochs[epoch]
