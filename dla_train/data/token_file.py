"""One `.bin/.idx` pair, opened and checked: where its documents lie, and their tokens.

Tokens are read with pread and the kernel's read-ahead off, not through a memory map. Rows are pieces from all over the
file: a map brings in megabytes of read-ahead for each, counts what it touched as the process's memory, and kills the
process where the file has been cut short meanwhile.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dla_train.data.errors import CorpusTooSmallError, TokenFileError
from dla_train.data.index_file import REMAKE, read_index
from dla_train.data.manifest import Manifest, read_manifest


def token_file_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """Paths of the `.bin`, `.idx` and `.json` (manifest) of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


class TokenFile:
    """One pair; documents without tokens are left out.

    Raises TokenFileError (missing, truncated, corrupt, of another manifest) and CorpusTooSmallError (no tokens).
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        bin_path, idx_path, manifest_path = token_file_paths(prefix)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise TokenFileError(
                    f"{path} does not exist; a token file is a .bin and an .idx, made by `dla-prepare tokens`"
                )
        index = read_index(idx_path)
        self.dtype: np.dtype[np.integer] = index.dtype
        """Type of a token in the `.bin`."""
        self.tokens = index.tokens
        """Tokens in the `.bin`."""
        self.lengths: NDArray[np.integer] = index.lengths
        """Tokens of each document, [documents]."""
        self.byte_starts: NDArray[np.int64] = index.byte_starts
        """First byte of each document, [documents]."""
        described, size = self.tokens * self.dtype.itemsize, bin_path.stat().st_size
        if size != described:
            state = "empty" if size == 0 else "truncated or another file's"
            raise TokenFileError(f"{bin_path} has {size} bytes but {idx_path} describes {described}: {state}; {REMAKE}")
        if size == 0:
            raise CorpusTooSmallError(f"{bin_path} holds no tokens; prepare it from a text that is not empty")
        self.manifest: Manifest | None = read_manifest(manifest_path) if manifest_path.exists() else None
        """None where there is no `.json`."""
        for what, here in (("tokens", self.tokens), ("documents", len(self.lengths))):
            if self.manifest is not None and getattr(self.manifest, what) != here:
                there = getattr(self.manifest, what)
                raise TokenFileError(f"{manifest_path} says {there} {what}, {idx_path} {here}; {REMAKE}")
        self._file = os.open(bin_path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, first: int, count: int) -> NDArray[np.integer]:
        """Tokens [first, first + count) of the whole file. Raises TokenFileError if it has been cut short meanwhile."""
        begin, size = first * self.dtype.itemsize, count * self.dtype.itemsize
        raw = os.pread(self._file, size, begin)
        while len(raw) < size:  # one call may give less, 2 GiB at most
            more = os.pread(self._file, size - len(raw), begin + len(raw))
            if not more:
                raise TokenFileError(f"{self.prefix}.bin ends at byte {begin + len(raw)}: cut since it was opened")
            raw += more
        return np.frombuffer(raw, dtype=self.dtype)
