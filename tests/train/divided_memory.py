"""What a divided model keeps and its ranks send in a step, called on every rank by tests/parallel/ranks.py."""

import dataclasses
import json

from dla_train.config import Config
from dla_train.hydra_app import compose
from dla_train.models.build import build_model
from dla_train.parallel.axes import Axes
from tests.train.held_memory import held_in_a_step
from tests.train.sent_bytes import SentBytes


def configuration(overrides: str) -> Config:
    """From JSON: the quickstart with these overrides, on the CPU."""
    return compose(["experiment=quickstart", "train.device=cpu", *json.loads(overrides)])


def held_and_sent(axes: Axes, overrides: str) -> dict[str, float]:
    """Bytes this rank holds after forward, and bytes it sends over each axis in forward and backward."""
    config = configuration(overrides)
    model = build_model(config, "cpu", axes).train()
    with SentBytes() as sent:
        loss, held = held_in_a_step(model, config)
        loss.backward()
    by_axis = {"tensor": sent.over(axes.tensor.group), "context": sent.over(axes.context.group)}
    assert sum(by_axis.values()) == sum(each.bytes for each in sent.found)
    return {**by_axis, **dataclasses.asdict(held), "parameters": sum(p.numel() for p in model.parameters())}
