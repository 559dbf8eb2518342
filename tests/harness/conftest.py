"""Small models of every kind with scattered weights, a trained run, and local copies of all tasks."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dla_train.data.tokenizer import Tokenizer, load_tokenizer
from dla_train.hydra_app import compose
from dla_train.models import LanguageModel, init_weights
from dla_train.train import train
from tests.harness.local_data import write_local_data
from tests.tiny import tiny_configs
from tests.train.runs import TINY, write_corpus

KINDS = (
    ("mamba2", "dla"),
    ("mamba2", "fixed"),
    ("gated_deltanet", "dla"),
    ("gated_deltanet", "log_linear"),
    ("gated_deltanet", "single"),
    ("attention", "none"),
)
"""Backbones and policies that decode in different ways."""


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Whatever asks for a connection is refused and listed."""
    asked: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield asked
    assert asked == []


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small prepared corpus and its tokenizer."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tokenizer(corpus: list[str]) -> Tokenizer:
    """310 ids, with BOS and EOS."""
    path = next(word for word in corpus if word.startswith("data.tokenizer=")).partition("=")[2]
    return load_tokenizer(Path(path))


@pytest.fixture(scope="session")
def run(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with checkpoints of steps 2 and 3."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    settings = ("memory.capacity=4", "model.num_layers=1", "train.steps=3", "checkpoint.interval_steps=2")
    train(compose([*TINY, *corpus, f"run_dir={run_dir}", *settings]))
    return run_dir


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local copies of every task, training splits too."""
    return write_local_data(tmp_path_factory.mktemp("data"), few_shot=True)


@pytest.fixture(scope="session")
def small() -> Callable[[str, str], LanguageModel]:
    """small(backbone, policy): a model of two layers, in evaluation mode, every parameter off its initial value."""

    def make(backbone: str, policy: str) -> LanguageModel:
        sizes = {"vocab_size": 310, "width": 16, **({"capacity": 12} if policy == "log_linear" else {})}
        model, memory = tiny_configs(backbone, policy, **sizes)
        made = init_weights(LanguageModel(model, memory), 0)
        generator = torch.Generator().manual_seed(1)
        for name, tensor in made.state_dict().items():
            shift = 0.3 * torch.randn(tensor.shape, generator=generator)
            tensor.add_(shift.abs() if name.endswith(("routing.gain", "tau.value")) else shift)
        return made.eval()

    return make


def token_rows(lengths: list[int], vocab: int = 310, seed: int = 0) -> list[tuple[int, ...]]:
    """Random rows of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, vocab, (length,), generator=generator).tolist()) for length in lengths]
