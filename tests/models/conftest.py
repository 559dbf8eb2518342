"""Small models of every kind, and the shipped configurations read without Hydra."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dla_train.config import MemoryConfig, ModelConfig
from dla_train.models import LanguageModel, init_weights
from tests.tiny import tiny_configs

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session")
def shipped():
    """shipped("model", name) or shipped("memory", name): the dataclass of one file under configs/."""

    def load(group, name):
        raw = OmegaConf.load(CONFIGS / group / f"{name}.yaml")
        assert raw.pop("defaults")[0] == f"base_{group}"
        schema = OmegaConf.structured({"model": ModelConfig, "memory": MemoryConfig}[group])
        return OmegaConf.to_object(OmegaConf.merge(schema, raw))

    return load


@pytest.fixture
def tiny():
    """tiny(backbone, policy, **changes): configurations of a model small enough for a token loop."""
    return tiny_configs


@pytest.fixture
def build():
    """build(model, memory, seed=0, scatter=True): an initialised model.

    `scatter` moves every parameter off its initial value, so that read weights are not 1, gains not 0 and biases
    not equal: a test of equality between two paths then covers them all.
    """

    def make(model, memory, *, seed=0, scatter=True, dtype=torch.float64, recompute=False):
        lm = init_weights(LanguageModel(model, memory, compute_dtype=dtype, recompute=recompute), seed)
        if dtype == torch.float64:
            lm.double()
        if scatter:
            generator = torch.Generator().manual_seed(seed + 1)
            with torch.no_grad():
                for name, parameter in lm.named_parameters():
                    spread = 1.0 if name.endswith(("slots.weight", "slots.bias")) else 0.3
                    shift = spread * torch.randn(parameter.shape, generator=generator).to(parameter)
                    parameter.add_(shift.abs() if name.endswith("routing.gain") else shift)
        return lm

    return make
