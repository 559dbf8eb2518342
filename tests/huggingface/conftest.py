"""Small models with scattered weights, and folders of them opened by transformers in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dla_train.config import MemoryConfig, ModelConfig
from dla_train.huggingface.writing import Content, write_files
from dla_train.models import LanguageModel, init_weights
from tests.tiny import tiny_configs
from tests.train.runs import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small prepared corpus and its tokenizer."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tokenizer_path(corpus: list[str]) -> Path:
    return Path(next(override for override in corpus if override.startswith("data.tokenizer=")).partition("=")[2])


@pytest.fixture(scope="session")
def content(tokenizer_path: Path) -> Callable[..., Content]:
    """content(backbone, policy, **changes): a small model whose every parameter is off its initial value."""

    def make(backbone: str, policy: str, **changes: Any) -> Content:
        model, memory = tiny_configs(backbone, policy, **{"name": "small", "vocab_size": 310, "width": 16, **changes})
        return Content(model, memory, scattered(model, memory), tokenizer_path, bos=True, context_tokens=64)

    return make


def scattered(model: ModelConfig, memory: MemoryConfig) -> dict[str, torch.Tensor]:
    """Initial values, each moved at random, so that a tensor that is mixed up or left out shows."""
    made = init_weights(LanguageModel(model, memory), 0).state_dict()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in made.items():
        shift = 0.3 * torch.randn(tensor.shape, generator=generator)
        tensor.add_(shift.abs() if name.endswith(("routing.gain", "tau.value")) else shift)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder(content, dtype="float32") -> a model folder that was written and not verified."""

    def write(content: Content, dtype: str = "float32", shard_bytes: int = 10**9) -> Path:
        path = tmp_path / f"folder{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        write_files(content, path, dtype, shard_bytes)
        return path

    return write


def opened(path: Path, dtype: Any = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=dtype).eval()


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found
