"""A small tokenizer for the preparation tests."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest

from data_prep.sources import text_sources
from data_prep.train_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty text files of a few KB."""
    folder = tmp_path_factory.mktemp("text")
    for name in sorted(topics)[:20]:
        (folder / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_path(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokenizer") / "small.model"
    return train_tokenizer(text_sources([text_folder]), output, 512, progress=False).path
