"""The corpus of the training tests."""

import pytest

from tests.train.runs import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small prepared corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
