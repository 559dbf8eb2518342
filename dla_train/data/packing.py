"""Rows of T + 1 tokens made of the documents of one epoch, with their document edges.

This file has the form `concatenate`: row r is stream[r*T : r*T + T + 1] of the documents one after another. Neighbours
share one token, which is the last target of one and the first input of the next, so every token is an input exactly
once. The rest at the end, shorter than a row, is left out of the epoch (other documents stand there in the next one). A
document cut by a row edge starts anew: memory never crosses rows (segments.py carries it inside a long one).
best_fit.py has the form that cuts fewer documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dla_train.data.indexed import TokenFiles

IGNORED_TARGET = -100
_STRIDE = 64  # documents between two of the offsets a layout keeps
_PIECE = 1 << 20  # documents looked at in one go, a multiple of the stride


@dataclass(frozen=True)
class PackedRows:
    """Rows with their edges: `tokens` [n, T+1] int64; `starts` [n, T+1] bool, True at a document's first token.

    A padding token is a document of its own, so nothing reads it and it is no target.
    """

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

    def split(self, context_tokens: int) -> PackedRows:
        """The same inputs and targets in rows of `context_tokens` (a divisor of T), [n * T/context, context + 1]."""
        rows, width = self.tokens.shape
        pieces = (width - 1) // context_tokens
        columns = np.arange(pieces)[:, None] * context_tokens + np.arange(context_tokens + 1)
        return PackedRows(
            self.tokens[:, columns].reshape(rows * pieces, -1), self.starts[:, columns].reshape(rows * pieces, -1)
        )


@dataclass(frozen=True)
class PackingReport:
    """What packing does to a corpus, in rows, tokens and documents of one epoch."""

    rows: int
    tokens: int
    padding_tokens: int
    documents: int
    split_documents: int
    """Documents cut by a row edge."""
    shortened_tokens: int
    """Tokens of split documents that stand in a row without the document's beginning."""


class Layout(Protocol):
    """One epoch's rows."""

    def cut(self, rows: NDArray[np.int64]) -> PackedRows:
        """The rows numbered `rows` [n]."""
        ...


class EpochLayout:
    """One epoch of `concatenate`: `order` [documents] puts the documents one after another; None is file order.

    Offsets are kept for every 64th document only; a row's own documents are walked from the nearest.
    """

    def __init__(self, files: TokenFiles, order: NDArray[np.integer] | None, context_tokens: int) -> None:
        self._files = files
        self._order = order
        self._context = context_tokens
        self._offsets = self._kept_offsets()

    def cut(self, rows: NDArray[np.int64]) -> PackedRows:
        """The rows numbered `rows` [n] (each below `row_count`)."""
        width = self._context + 1
        begin = rows.astype(np.int64) * self._context
        row, place, edge = self._walk(begin, begin + width)
        document = self._document(place)
        length = self._files.document_lengths[document].astype(np.int64)
        piece_begin = np.maximum(edge, begin[row])
        piece_end = np.minimum(edge + length, begin[row] + width)
        inside = piece_end > piece_begin
        row, document, edge = row[inside], document[inside], edge[inside]
        piece_begin, piece_end = piece_begin[inside], piece_end[inside]
        offset = piece_begin - edge
        tokens = self._files.gather(document, offset, piece_end - piece_begin)
        starts = np.zeros(len(rows) * width, dtype=np.bool_)
        starts[(row * width + piece_begin - begin[row])[offset == 0]] = True
        return PackedRows(tokens.reshape(-1, width), starts.reshape(-1, width))

    def _document(self, place: NDArray[np.int64]) -> NDArray[np.integer]:
        return place if self._order is None else self._order[place]

    def _kept_offsets(self) -> NDArray[np.int64]:
        """First token in the stream of the documents at places 0, 64, 128, ... [ceil(documents / 64)] int64."""
        kept, tokens, count = [], 0, self._files.documents
        for begin in range(0, count, _PIECE):
            place = np.arange(begin, min(begin + _PIECE, count))
            ends = tokens + np.cumsum(self._files.document_lengths[self._document(place)], dtype=np.int64)
            kept.append(np.concatenate([[tokens], ends[_STRIDE - 1 : len(ends) - 1 : _STRIDE]]))
            tokens = int(ends[-1])
        return np.concatenate(kept)

    def _walk(
        self, begin: NDArray[np.int64], end: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(row, place in the order, first token in the stream) of all documents that may touch a row's [begin, end)."""
        first = np.searchsorted(self._offsets, begin, side="right") - 1
        last = np.searchsorted(self._offsets, end, side="left")
        counts = np.minimum(last * _STRIDE, self._files.documents) - first * _STRIDE
        row = np.repeat(np.arange(len(begin)), counts)
        row_first = np.cumsum(counts) - counts
        place = np.arange(len(row)) - (row_first - first * _STRIDE)[row]
        length = self._files.document_lengths[self._document(place)].astype(np.int64)
        before = np.cumsum(length) - length
        return row, place, before - before[row_first][row] + self._offsets[first][row]


def concatenation_report(files: TokenFiles, context_tokens: int) -> PackingReport:
    """Padding and truncation of `concatenate`, in file order: in another, other documents of these numbers are cut."""
    split = shortened = 0
    rows, begin = row_count(files.tokens, context_tokens), 0
    for at in range(0, files.documents, _PIECE):
        lengths = files.document_lengths[at : at + _PIECE].astype(np.int64)
        ends = begin + np.cumsum(lengths)
        to_edge = -(ends - lengths) % context_tokens
        to_edge[to_edge == 0] = context_tokens
        cut = lengths > to_edge
        split, shortened, begin = split + int(cut.sum()), shortened + int((lengths - to_edge)[cut].sum()), int(ends[-1])
    return PackingReport(rows, files.tokens, 0, files.documents, split, shortened)


def row_count(tokens: int, context_tokens: int) -> int:
    """Full rows in a stream of `tokens` (each row needs one token more than its T inputs)."""
    return max(tokens - 1, 0) // context_tokens
