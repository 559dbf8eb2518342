"""Rows of whole documents: best-fit decreasing packing (Ding et al. 2024, "Fewer Truncations", arXiv 2404.10830).

A document of at most T tokens lies whole in one row; a longer one gives rows of T tokens of its own and a rest, which
is packed like a document. What is left of a row is padding, and every padding token is a document of its own.

The decision a reader would ask about: which lengths share a row depends on the lengths alone, so the packing is solved
once on their histogram, in groups of equal rows (`pack_lengths`): tens of thousands of groups for any number of
documents. Only which document of a length takes which place of that length is shuffled anew every epoch. There is no
index to build ahead, to cache or to wait for.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dla_train.data.indexed import TokenFiles
from dla_train.data.order import grouped_order
from dla_train.data.packing import PackedRows, PackingReport

PADDING = 0
"""Token id of padding; its value reaches nothing that counts."""
_PIECE = 1 << 20
_Entries = tuple["_Entries", int, int] | None  # a linked list: (the entries before, length, pieces of it)


@dataclass(frozen=True)
class RowGroups:
    """Groups of rows that hold the same lengths. Entry i: `pieces[i]` pieces of `lengths[i]` tokens in every row."""

    first_row: NDArray[np.int64]
    """[groups + 1]: rows before each group."""
    first_entry: NDArray[np.int64]
    """[groups + 1]: entries before each group."""
    lengths: NDArray[np.int64]
    pieces: NDArray[np.int64]
    first_piece: NDArray[np.int64]
    """[entries]: pieces of this length before this group."""

    @property
    def rows(self) -> int:
        """Rows of all groups."""
        return int(self.first_row[-1])


def pack_lengths(histogram: NDArray[np.int64], context_tokens: int) -> RowGroups:
    """Best-fit decreasing packing of `histogram[length]` pieces of each length (below T + 1) into rows of T tokens.

    The rows' fill is that of placing the pieces one by one, longest first, each into the fullest row it fits.
    """
    waiting: dict[int, list[tuple[int, _Entries]]] = {}  # space left -> groups (rows, entries)
    spaces: list[int] = []  # keys of `waiting`, sorted

    def put(space: int, rows: int, entries: _Entries) -> None:
        if space not in waiting:
            waiting[space] = []
            insort(spaces, space)
        waiting[space].append((rows, entries))

    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            place = bisect_left(spaces, length)
            space = spaces[place] if place < len(spaces) else context_tokens
            each = space // length  # a row takes one piece after another until the next does not fit
            if place < len(spaces):
                rows, entries = waiting[space].pop()
                if not waiting[space]:
                    del waiting[space], spaces[place]
            else:
                rows, entries = -(-left // each), None
            full = min(rows, left // each)
            left -= full * each
            if full:
                put(space - each * length, full, (entries, length, each))
            if rows > full and left:
                put(space - left * length, 1, (entries, length, left))
                left, full = 0, full + 1
            if rows > full:
                put(space, rows - full, entries)
    return _groups([group for groups in waiting.values() for group in groups], len(histogram))


def _groups(packed: list[tuple[int, _Entries]], lengths: int) -> RowGroups:
    rows, entry_counts, used = [0], [0], [0] * lengths
    flat: list[tuple[int, int, int]] = []
    for count, entries in packed:
        before = len(flat)
        while entries is not None:
            entries, length, pieces = entries
            flat.append((length, pieces, used[length]))
            used[length] += pieces * count
        rows.append(count)
        entry_counts.append(len(flat) - before)
        flat[before:] = reversed(flat[before:])  # longest first
    table = np.array(flat, dtype=np.int64).reshape(-1, 3)
    return RowGroups(np.cumsum(rows), np.cumsum(entry_counts), table[:, 0], table[:, 1], table[:, 2])


class BestFit:
    """The packing of a corpus into rows of `context_tokens`, the same in every epoch; `epoch` gives its documents."""

    def __init__(self, files: TokenFiles, context_tokens: int) -> None:
        self._files, self.context_tokens = files, context_tokens
        histogram, long_documents, full_rows = np.zeros(context_tokens, np.int64), [], []
        for begin in range(0, files.documents, _PIECE):
            whole, rest = np.divmod(files.document_lengths[begin : begin + _PIECE], context_tokens)
            histogram += np.bincount(rest, minlength=context_tokens)
            long = np.flatnonzero(whole)
            long_documents.append(begin + long)
            full_rows.append(whole[long])
        self._without_rest = int(histogram[0])
        histogram[0] = 0
        self._first_of_length = self._without_rest + np.cumsum(histogram) - histogram
        self._groups = pack_lengths(histogram, context_tokens)
        self._long = np.concatenate(long_documents)
        self._full_before = np.concatenate([[0], np.cumsum(np.concatenate(full_rows), dtype=np.int64)])

    @property
    def rows(self) -> int:
        """Rows of an epoch: those that one document fills, then the packed ones."""
        return int(self._full_before[-1]) + self._groups.rows

    def report(self) -> PackingReport:
        """Padding and truncation."""
        lengths = self._files.document_lengths[self._long].astype(np.int64)
        split = lengths > self.context_tokens
        return PackingReport(
            rows=self.rows,
            tokens=self._files.tokens,
            padding_tokens=self.rows * self.context_tokens - self._files.tokens,
            documents=self._files.documents,
            split_documents=int(split.sum()),
            shortened_tokens=int((lengths[split] - self.context_tokens).sum()),
        )

    def epoch(self, seed: int, epoch: int) -> BestFitLayout:
        """The rows of one epoch: documents of equal length change places with each other."""
        rests = np.empty(self._files.documents, dtype=np.uint32)
        for begin in range(0, len(rests), _PIECE):
            rests[begin : begin + _PIECE] = self._files.document_lengths[begin : begin + _PIECE] % self.context_tokens
        return BestFitLayout(self, self._files, grouped_order(rests, seed, epoch))

    def pieces(
        self, rows: NDArray[np.int64], by_length: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.integer], NDArray[np.int64], NDArray[np.int64]]:
        """(index into `rows`, document, first token in it, tokens) of every piece, row by row.

        A row filled by a document that goes on has T + 1 tokens: the last is the target of the one before.
        """
        full = rows < self._full_before[-1]
        at, document, offset, count = self._packed(rows[~full] - self._full_before[-1], by_length)
        index = np.searchsorted(self._full_before, rows[full], side="right") - 1
        long = self._long[index]
        begin = (rows[full] - self._full_before[index]) * self.context_tokens
        size = np.minimum(self._files.document_lengths[long] - begin, self.context_tokens + 1)
        at = np.concatenate([np.flatnonzero(full), np.flatnonzero(~full)[at]])
        order = np.argsort(at, kind="stable")
        documents, offsets = np.concatenate([long, document]), np.concatenate([begin, offset])
        return at[order], documents[order], offsets[order], np.concatenate([size, count])[order]

    def _packed(
        self, rows: NDArray[np.int64], by_length: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.integer], NDArray[np.int64], NDArray[np.int64]]:
        groups = self._groups
        group = np.searchsorted(groups.first_row, rows, side="right") - 1
        row, entry = _ragged(groups.first_entry[group], groups.first_entry[group + 1] - groups.first_entry[group])
        length, pieces = groups.lengths[entry], groups.pieces[entry]
        in_group = (rows - groups.first_row[group])[row]
        first = self._first_of_length[length] + groups.first_piece[entry] + in_group * pieces
        at, place = _ragged(first, pieces)
        document = by_length[place]
        return row[at], document, self._files.document_lengths[document] - length[at], length[at]


class BestFitLayout:
    """One epoch: `by_length` [documents] has the documents sorted by what is left of them beside full rows."""

    def __init__(self, packing: BestFit, files: TokenFiles, by_length: NDArray[np.integer]) -> None:
        self._packing, self._files, self._by_length = packing, files, by_length

    def cut(self, rows: NDArray[np.int64]) -> PackedRows:
        """The rows numbered `rows` [n] (each below `BestFit.rows`)."""
        width = self._packing.context_tokens + 1
        at, document, offset, count = self._packing.pieces(rows.astype(np.int64), self._by_length)
        filled = np.bincount(at, weights=count, minlength=len(rows)).astype(np.int64)
        inside = np.arange(width) < filled[:, None]
        tokens = np.full((len(rows), width), PADDING, dtype=np.int64)
        tokens[inside] = self._files.gather(document, offset, count)
        starts = ~inside
        row_first = (np.cumsum(filled) - filled)[at]
        starts[at, np.cumsum(count) - count - row_first] = True
        return PackedRows(tokens, starts)


def _ragged(first: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(i, first[i] + j) for every i and j < counts[i], i by i."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) + (first - (np.cumsum(counts) - counts))[index]
