"""The corpus and the tiny runs of tests/train."""

from tests.train.conftest import corpus, tiny

__all__ = ["corpus", "tiny"]
