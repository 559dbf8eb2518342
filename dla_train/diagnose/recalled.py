"""Targets that a model can know from earlier in the same document and from nowhere else, by how far back they stand.

A target is recalled where its pair with the input token came earlier in its document: whoever remembers what followed
that token then can answer. Pairs that stand in another of the documents too are left out, for a model may know those
by heart. The losses of these targets tell memories apart that the mean of all targets does not (associative recall
hits of Arora et al., arXiv 2312.04927, section 3, who leave out the pairs that are frequent in training).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dla_train.diagnose.scoring import Documents
from dla_train.diagnose.statistics import Losses, document_means


def recall_distances(documents: Documents) -> NDArray[np.int64]:
    """[N, T]: tokens since the same (input, target) pair, 0 where the target is not recalled or there is none."""
    tokens, positions = documents.tokens, documents.positions
    rows, places = np.nonzero(np.arange(positions) < documents.lengths[:, None] - 1)
    pairs = tokens[rows, places] * (tokens.max() + 1) + tokens[rows, places + 1]
    order = np.lexsort((places, rows, pairs))
    rows, places, pairs = rows[order], places[order], pairs[order]
    starts = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1]))
    counts = np.diff(np.append(starts, len(pairs)))
    one_document = np.repeat(rows[starts] == rows[starts + counts - 1], counts)  # rows rise within equal pairs
    again = one_document & np.append(False, pairs[1:] == pairs[:-1])
    distances = np.zeros((len(tokens), positions), dtype=np.int64)
    distances[rows[again], places[again]] = np.diff(places, prepend=0)[again]
    return distances


def distance_ranges(positions: int) -> list[tuple[int, int]]:
    """[first, end) of distances: 0 (not recalled), all that are recalled, and these by powers of two."""
    end = max(positions, 2)
    doublings = [(2**power, min(2 ** (power + 1), end)) for power in range(40) if 2**power < end]
    return [(0, 1), (1, end), *doublings]


def means_by_distance(
    losses: Losses, distances: NDArray[np.int64], ranges: Sequence[tuple[int, int]]
) -> NDArray[np.float64]:
    """[N, ranges]: each document's mean over its targets [N, T] of such distances; nan where it has none."""
    everywhere = [(0, losses.shape[1])]
    chosen = [np.where((first <= distances) & (distances < end), losses, np.nan) for first, end in ranges]
    return np.concatenate([document_means(some, everywhere) for some in chosen], axis=1)
