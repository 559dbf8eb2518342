"""Typed errors of the data path: every message names the file or key, what is wrong, and the mend.

All derive from `DataError` (a ValueError), so a caller can treat "the data cannot be used" as one case.
"""

from __future__ import annotations


class DataError(ValueError):
    """The token files, the tokenizer or their combination cannot be used."""


class TokenFileError(DataError):
    """A .bin, .idx or manifest is missing, truncated or corrupt."""


class TokenizerError(DataError):
    """A tokenizer cannot be loaded, or is not the one the files were written with."""


class VocabularyError(DataError):
    """Token ids do not fit the model's vocabulary."""


class CorpusTooSmallError(DataError):
    """The corpus is empty, or holds less than one row or one global batch."""
