"""What a divided model keeps and its ranks send in a step, called on every rank by tests/parallel/ranks.py."""

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from dla_train.config import Config
from dla_train.engine import build_engine
from dla_train.hydra_app import compose
from dla_train.models.build import build_model, meta_model
from dla_train.parallel import regions
from dla_train.parallel.axes import Axes
from dla_train.parallel.mesh import Mesh
from tests.train.held_memory import bytes_of, held_in_a_step


def configuration(overrides: str) -> Config:
    """From JSON: the quickstart with these overrides, on the CPU."""
    return compose(["experiment=quickstart", "train.device=cpu", *json.loads(overrides)])


def held_and_sent(axes: Axes, overrides: str) -> dict[str, float]:
    """Bytes this rank holds after forward, and bytes it sends over each axis in forward and backward."""
    config = configuration(overrides)
    model = build_model(config, "cpu", axes).train()
    with sending() as sent:
        loss, held = held_in_a_step(model, config)
        loss.backward()
    groups = {id(axes.tensor.group): "tensor", id(axes.context.group): "context"}
    by_axis = dict.fromkeys(("tensor", "context"), 0.0)
    for group, size in sent:
        by_axis[groups[id(group)]] += size
    return {**by_axis, **dataclasses.asdict(held), "parameters": sum(p.numel() for p in model.parameters())}


def engine_states(axes: Axes, overrides: str) -> dict[str, float]:
    """Bytes of weights, and of master copies and moments, that DeepSpeed keeps on this rank after a step.

    And its settings: gradients in a bucket, and weights that stage 3 leaves gathered.
    """
    config = configuration(overrides)
    with Mesh.start(config) as mesh, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's own, of names that torch has deprecated
        model = meta_model(config).train()
        engine = build_engine(config, model, mesh)
        for last in (False, True):
            nats, _, _ = model.token_loss(*logits_and_targets(engine.module, config))
            engine.backward(nats, last=last)
        engine.step(1e-3)
        inner = engine.module.optimizer.optimizer
        moments = [value for state in inner.state.values() for value in state.values() if value.numel() > 1]
        weights = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
        return {
            "weights": bytes_of(weights),
            "optimizer": bytes_of([*inner.state, *moments]),
            "bucket": float(engine.module.zero_reduce_bucket_size()),
            "gathered": float(engine.module.zero_max_live_parameters()),
        }


def logits_and_targets(module: Callable[..., Any], config: Config) -> tuple[Tensor, Tensor]:
    """Of a micro-batch of zeros."""
    tokens = torch.zeros(config.train.micro_batch_rows, config.data.context_tokens, dtype=torch.int64)
    return module(tokens).logits, tokens


@contextlib.contextmanager
def sending() -> Iterator[list[tuple[Any, float]]]:
    """(group, bytes sent by a rank over a ring) of every collective inside the block."""
    sent: list[tuple[Any, float]] = []

    def counted(operation: Callable[..., Any], times: int, which: int) -> Callable[..., Any]:
        def call(*args: Any, group: Any = None, **options: Any) -> Any:
            ranks = dist.get_world_size(group)
            whole: Tensor = args[which]
            sent.append((group, times * (ranks - 1) / ranks * whole.numel() * whole.element_size()))
            return operation(*args, group=group, **options)

        return call

    with (
        mock.patch.object(dist, "all_reduce", counted(dist.all_reduce, 2, 0)),
        mock.patch.object(dist, "all_to_all_single", counted(dist.all_to_all_single, 1, 0)),
        mock.patch.object(regions, "_all_gather", counted(regions._all_gather, 1, 0)),
        mock.patch.object(regions, "_reduce_scatter", counted(regions._reduce_scatter, 1, 1)),
    ):
        yield sent
