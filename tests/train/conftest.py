"""A corpus of a few thousand tokens, and the configuration of a tiny run over it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dla_train.config import Config
from dla_train.hydra_app import compose
from tests.train.runs import TINY


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small prepared corpus, its held-out part and its tokenizer; an epoch is under 8 steps."""
    from data_prep.sources import text_sources
    from data_prep.train_tokenizer import train_tokenizer
    from data_prep.write_tokens import write_tokens

    folder = tmp_path_factory.mktemp("corpus")
    for index in range(60):
        lines = range(1, 4 + index % 5)
        words = " ".join(f"line {index * line % 13} adds {line * line % 17} to {index}" for line in lines)
        (folder / f"{index:02}.txt").write_text(f"{words}. Gr\u00fc\u00dfe {index}\n", encoding="utf-8")
    sources = text_sources(sorted(folder.glob("*.txt")))
    tokenizer = train_tokenizer(sources, folder / "tiny.model", 310, progress=False).path
    part = text_sources(sorted(folder.glob("*.txt"))[:36])
    write_tokens(part, folder / "tiny", tokenizer, validation_fraction=0.2, progress=False)
    return [
        f"data.train=[{folder}/tiny_train]",
        f"data.validation=[{folder}/tiny_validation]",
        f"data.tokenizer={tokenizer}",
    ]


@pytest.fixture
def tiny(corpus: list[str], tmp_path: Path) -> Callable[..., Config]:
    """tiny("train.steps=4", ...) -> configuration of a run of seconds in tmp_path/run; later overrides win."""

    def make(*overrides: str) -> Config:
        return compose([*TINY, *corpus, f"run_dir={tmp_path}/run", *overrides])

    return make


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
