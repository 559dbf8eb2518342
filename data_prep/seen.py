"""Which documents have been seen: exact and near-duplicates by 64-bit hashes, kept beside the shards for a restart.

64 bits are enough: among 25 million different documents two share a hash with a probability of 2 in 100,000. A set of
Python integers takes about 70 bytes an entry: one a document, or ten with near-duplicates.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from data_prep.encoding import Outcome


class Seen:
    """Hashes of the documents kept so far; `exact` and `near` say what is looked for."""

    def __init__(self, exact: bool, near: bool) -> None:
        self._exact, self._near = exact, near
        self._hashes: set[int] = set()
        self._added: list[int] = []  # since the last `save`

    def duplicate(self, outcome: Outcome) -> str | None:
        """`duplicate`, `near_duplicate` or None for a document, which is remembered in the last case."""
        if not self._exact:
            return None
        if outcome.fingerprint in self._hashes:
            return "duplicate"
        if self._near and not self._hashes.isdisjoint(outcome.bands):
            return "near_duplicate"
        new = (outcome.fingerprint, *outcome.bands) if self._near else (outcome.fingerprint,)
        self._hashes.update(new)
        self._added += new
        return None

    def save(self, path: Path) -> None:
        """Write what was added since the last call, flushed to disk."""
        if self._exact:
            with path.open("wb") as stream:
                np.array(self._added, dtype="<u8").tofile(stream)
                stream.flush()
                os.fsync(stream.fileno())
            self._added = []

    def load(self, path: Path) -> None:
        """Remember what a finished shard added."""
        if self._exact:
            self._hashes.update(np.fromfile(path, dtype="<u8").tolist())
