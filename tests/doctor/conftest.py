"""A corpus, and configurations of a small run over it that is about to begin."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dla_train.config import Config
from dla_train.hydra_app import compose
from tests.train.runs import TINY, write_corpus


@pytest.fixture(scope="session")
def whole_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def corpus(whole_corpus: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(whole_corpus, tmp_path / "corpus", ignore=shutil.ignore_patterns("*.txt")))


@pytest.fixture
def words(corpus: Path, tmp_path: Path) -> list[str]:
    """The command line of a run that nothing is wrong with."""
    files = [f"data.train=[{corpus}/tiny_train]", f"data.validation=[{corpus}/tiny_validation]"]
    return [*TINY, *files, f"data.tokenizer={corpus}/tiny.model", f"run_dir={tmp_path}/run"]


@pytest.fixture
def tiny(words: list[str]) -> Callable[..., Config]:
    """tiny("train.steps=4", ...): the configuration with other settings."""
    return lambda *more: compose([*words, *more])
