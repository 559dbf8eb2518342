"""A study of seconds: two memories of one backbone on eight needles."""

import pytest

from dla_train.hydra_app import config_directory
from dla_train.recall.settings import StudyConfig

SHIPPED = [path.stem for path in sorted((config_directory() / "study").iterdir()) if not path.stem.startswith("base_")]
"""Names of the studies in configs/study."""

TINY = StudyConfig(
    name="tiny",
    task={"name": "paired_token", "tokens": 24, "keys": 8, "values": 8},
    parts={"few": {"needles": 2}, "many": {"needles": 8}},
    easy="few",
    easy_accuracy=0.3,
    model={
        "width": 32,
        "num_layers": 1,
        "num_heads": 1,
        "num_key_heads": 1,
        "key_dim": 4,
        "value_dim": 16,
        "mlp_width": 32,
        "conv_width": 0,
    },
    backbones=["gated_deltanet"],
    memories={
        "single": {"policy": "single", "capacity": 1, "read": "unit"},
        "dla": {"policy": "dla", "capacity": 6, "read": "content", "gain_init": 4.0},
    },
    decay_rate=0.01,
    optim={"warmup_steps": 5, "weight_decay": 0.01},
    learning_rates=[1e-2],
    seeds=[0, 1],
    steps=12,
    batch_rows=16,
    held_out_rows=300,
    curve_interval_steps=5,
    curve_rows=16,
    processes=1,
    device="cpu",
    progress=False,
)
"""Change a copy of it with dataclasses.replace."""


@pytest.fixture
def tiny() -> StudyConfig:
    return TINY
