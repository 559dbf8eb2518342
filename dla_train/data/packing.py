"""Rows of T + 1 tokens cut from the concatenated documents of one epoch, with their document edges.

Row r is stream[r*T : r*T + T + 1]: neighbours share one token, which is the last target of one and the first input of
the next, so every token is an input exactly once. The rest at the end, shorter than a row, is left out of the epoch
(other documents stand there in the next one). A document cut by a row edge starts anew: memory never crosses rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dla_train.data.indexed import TokenFiles

IGNORED_TARGET = -100


@dataclass(frozen=True)
class PackedRows:
    """Rows with their edges: `tokens` [n, T+1] int64; `starts` [n, T+1] bool, True at a document's first token."""

    tokens: NDArray[np.int64]
    starts: NDArray[np.bool_]

    def targets(self) -> NDArray[np.int64]:
        """Next token of every input, [n, T] int64; -100 where it begins another document."""
        return np.where(self.starts[:, 1:], IGNORED_TARGET, self.tokens[:, 1:])

    def cu_seqlens(self) -> NDArray[np.int32]:
        """Offsets of documents in the flattened n*T inputs, [M+1] int32: 0, every row and document start, n*T."""
        edges = self.starts[:, :-1].copy()
        edges[:, 0] = True
        return np.append(np.flatnonzero(edges), edges.size).astype(np.int32)


class EpochLayout:
    """One epoch: `order` [documents] puts the documents one after another, cut into rows of `context_tokens` + 1."""

    def __init__(self, files: TokenFiles, order: NDArray[np.int64], context_tokens: int) -> None:
        self._files = files
        self._order = order
        self._context = context_tokens
        self._edges = np.concatenate([[0], np.cumsum(files.document_lengths[order])])

    def cut(self, rows: NDArray[np.int64]) -> PackedRows:
        """The rows numbered `rows` [n] (each below `row_count`)."""
        width = self._context + 1
        begin = rows * self._context
        first = np.searchsorted(self._edges, begin, side="right") - 1
        last = np.searchsorted(self._edges, begin + self._context, side="right") - 1
        pieces = last - first + 1  # documents each row touches
        row = np.repeat(np.arange(len(rows)), pieces)
        document = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces - first, pieces)
        piece_begin = np.maximum(self._edges[document], begin[row])
        piece_end = np.minimum(self._edges[document + 1], begin[row] + width)
        offset = piece_begin - self._edges[document]
        tokens = self._files.gather(self._order[document], offset, piece_end - piece_begin)
        starts = np.zeros(len(rows) * width, dtype=np.bool_)
        starts[(row * width + piece_begin - begin[row])[offset == 0]] = True
        return PackedRows(tokens.reshape(-1, width), starts.reshape(-1, width))


def row_count(tokens: int, context_tokens: int) -> int:
    """Full rows in a stream of `tokens` (each row needs one token more than its T inputs)."""
    return max(tokens - 1, 0) // context_tokens
