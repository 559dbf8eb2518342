"""The unigram entropy of token files: what a model reaches that has learnt token frequencies and nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dla_train.data.indexed import TokenFiles


def token_counts(files: TokenFiles, vocab_size: int) -> NDArray[np.int64]:
    """[vocab_size] int64: occurrences of each token id."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for document in range(files.documents):
        counts += np.bincount(files.read(document), minlength=vocab_size)
    return counts


def unigram_entropy(files: TokenFiles, vocab_size: int) -> float:
    """Entropy of the token distribution, nats per token. Raises ValueError if there are no tokens."""
    counts = token_counts(files, vocab_size)
    if not counts.sum():
        raise ValueError(f"{', '.join(files.prefixes)} has no tokens; the entropy of nothing is undefined")
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
