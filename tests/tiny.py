"""Models small enough for a token loop, of any backbone and memory: the one place that names their sizes."""

import dataclasses
from typing import Any

from dla_train.config import MemoryConfig, ModelConfig

READS = {"none": "unit", "single": "unit", "log_linear": "slot"}
"""`memory.read` of a policy; of the others `content`."""
CAPACITIES = {"single": 1, "log_linear": 8}
"""Slots of a policy; of the others 4."""

OWN: dict[str, dict[str, int]] = {"log_linear": {"levels": 5}, "fixed": {"interval_tokens": 3}}
"""Settings that only one policy has."""


def tiny_configs(backbone: str, policy: str, **changes: Any) -> tuple[ModelConfig, MemoryConfig]:
    """Configurations of two layers of width 12; `changes` are settings of either."""
    attention = backbone == "attention"
    model = ModelConfig(
        name="tiny",
        backbone=backbone,
        vocab_size=17,
        width=12,
        num_layers=2,
        num_heads=4,
        num_key_heads=2,
        key_dim=4,
        value_dim=4 if attention else 6,
        mlp_width=20,
        conv_width=0 if attention else 4,
    )
    capacity, read = CAPACITIES.get(policy, 4), READS.get(policy, "content")
    memory = MemoryConfig(policy=policy, capacity=capacity, read=read, **OWN.get(policy, {}))
    of_model = {field.name for field in dataclasses.fields(ModelConfig)} & changes.keys()
    model = dataclasses.replace(model, **{key: changes[key] for key in of_model})
    return model, dataclasses.replace(memory, **{key: changes[key] for key in changes.keys() - of_model})
