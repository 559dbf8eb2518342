"""The small models of tests/models."""

from tests.models.conftest import build, tiny

__all__ = ["build", "tiny"]
