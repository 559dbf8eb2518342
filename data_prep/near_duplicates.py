"""Near-duplicates: documents that share most of their runs of five words.

MinHash signatures are datasketch's, and so is the choice of bands for a threshold. For 0.8 it takes 9 bands of 13: a
document is taken for a copy of one with Jaccard similarity 0.9 with probability 0.93, 0.8 with 0.40, 0.65 with 0.03.
Bands are kept as 64-bit hashes in a set, not in the library's tables, so that they can be written piece by piece beside
shards.
"""

from __future__ import annotations

import functools
import hashlib
import re

from data_prep.records import PrepareError

PERMUTATIONS = 128
SHINGLE_WORDS = 5
_WORD = re.compile(r"\w+")


class NearDuplicates:
    """Signatures for one threshold. Raises PrepareError if it is not in (0, 1), or datasketch is missing."""

    def __init__(self, similarity: float) -> None:
        if not 0.0 < similarity < 1.0:
            raise PrepareError(f"similarity={similarity} is not between 0 and 1; 0.8 is usual")
        try:
            import datasketch
        except ModuleNotFoundError as error:
            raise PrepareError(
                "near-duplicates need datasketch; run `pip install dla-train[dedup]`, or take --duplicates exact"
            ) from error
        self.band_count, self._rows = _bands_and_rows(similarity)
        self._empty = datasketch.MinHash(num_perm=PERMUTATIONS, seed=1)
        self.version = str(datasketch.__version__)
        """Of datasketch: its hashes are comparable within one version."""

    def bands(self, text: str) -> tuple[int, ...]:
        """One hash for each band of the text's signature: texts that share one are taken for near-duplicates."""
        words = _WORD.findall(text.lower())
        if not words:
            return ()  # signs alone: nothing to compare but the whole, which the exact hash does
        last = max(len(words) - SHINGLE_WORDS, 0)
        shingles = {" ".join(words[i : i + SHINGLE_WORDS]).encode() for i in range(last + 1)}
        signature = self._empty.copy()
        signature.update_batch(shingles)
        values = signature.hashvalues
        return tuple(
            _band_hash(band, values[band * self._rows : (band + 1) * self._rows].tobytes())
            for band in range(self.band_count)
        )


@functools.cache  # the library integrates for it, a tenth of a second
def _bands_and_rows(similarity: float) -> tuple[int, int]:
    import datasketch

    index = datasketch.MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS)
    return int(index.b), int(index.r)


def _band_hash(band: int, rows: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(rows, digest_size=8, salt=band.to_bytes(2)).digest())
