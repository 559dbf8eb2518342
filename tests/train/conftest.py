"""A corpus of a few thousand tokens, and the configuration of a tiny run over it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dla_train.config import Config
from dla_train.hydra_app import compose
from tests.train.runs import TINY, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small prepared corpus, its held-out part and its tokenizer; an epoch is under 8 steps."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def tiny(corpus: list[str], tmp_path: Path) -> Callable[..., Config]:
    """tiny("train.steps=4", ...) -> configuration of a run of seconds in tmp_path/run; later overrides win."""

    def make(*overrides: str) -> Config:
        return compose([*TINY, *corpus, f"run_dir={tmp_path}/run", *overrides])

    return make
