"""What an engine holds from step to step and its ranks send, called on every rank by tests/parallel/ranks.py."""

import functools
import gc
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dla_train.engine import Engine, LocalEngine, build_engine, gradients, zero_settings
from dla_train.engine.zero_settings import import_deepspeed
from dla_train.models import LanguageModel
from dla_train.models.build import meta_model
from dla_train.parallel.axes import Axes
from dla_train.parallel.mesh import Mesh
from tests.train.divided_memory import configuration
from tests.train.held_memory import LiveBytes, bytes_of
from tests.train.sent_bytes import SentBytes

BUCKET, LIVE, PREFETCH, PERSISTENT = 100_000, 200_000, 50_000, 600
"""Elements: so few that a model of a million weights fills several buckets and stage 3 gathers and releases."""


def set_sizes() -> None:
    """Give the engines these sizes, in this process."""
    gradients.BUCKET_ELEMENTS = zero_settings.BUCKET_ELEMENTS = BUCKET
    zero_settings.LIVE_ELEMENTS, zero_settings.PREFETCH_ELEMENTS = LIVE, PREFETCH
    zero_settings.PERSISTENT_ELEMENTS = PERSISTENT


def engine_states(axes: Axes, overrides: str, unbucketed: int = 0) -> dict[str, float]:
    """Bytes held at moments of a second step, in which every state is there, and bytes sent in it.

    Everything that operations make is counted, on the host and on the device alike, which here are one. `unbucketed`:
    gradients that DeepSpeed sums at once where it has no bucket size of ours; 0 leaves its own.
    """
    set_sizes()
    import_deepspeed()
    gc.collect()
    gc.freeze()  # modules stay, so the collections below need not look at them
    config = configuration(overrides)
    with Mesh.start(config) as mesh, warnings.catch_warnings(), LiveBytes() as live:
        warnings.simplefilter("ignore")  # DeepSpeed's own, of names that torch has deprecated
        model = meta_model(config, mesh.axes).train()
        engine = build_engine(config, model, mesh)
        if unbucketed:
            sums = engine.module.allreduce_gradients
            engine.module.allreduce_gradients = functools.partial(sums, bucket_size=unbucketed)
        tokens = torch.zeros(config.train.micro_batch_rows, config.data.context_tokens, dtype=torch.int64)
        micro_batches = config.train.global_batch_rows // config.train.micro_batch_rows // mesh.axes.data.size
        _step(engine, model, tokens, micro_batches)
        with SentBytes() as sent:
            found = _step(engine, model, tokens, micro_batches, live)
        found["context"] = sent.over(mesh.axes.context.group)
        found["data"] = sum(each.bytes for each in sent.found) - found["context"]
        found["weights"] = bytes_of(stored(model))
        found["optimizer"] = bytes_of(optimizer_tensors(engine), stored(model))
        if not isinstance(engine, LocalEngine):
            found |= own_sizes(engine)
    return {key: float(value) for key, value in found.items()}


def _step(
    engine: Engine, model: LanguageModel, tokens: Tensor, micro_batches: int, live: LiveBytes | None = None
) -> dict[str, float]:
    """A step; with `live`, the most held in its last backward pass, after its first one, and in the step proper.

    DeepSpeed leaves cycles, whose end would be anybody's guess if they were not collected before every look.
    """
    found: dict[str, float] = {}
    for index in range(micro_batches):
        nats, _, _ = model.token_loss(engine.module(tokens).logits, tokens)
        if live is not None:
            gc.collect()
            live.most = live.now
        engine.backward(nats, last=index == micro_batches - 1)
        del nats
        if live is not None:
            gc.collect()
            found |= {"backward": live.most}
            if not index:
                found |= {"between": live.now, "buckets": bytes_of(bucket_tensors(engine))}
            live.most = live.now
    engine.step(1e-3)
    return found if live is None else found | {"step": live.most}


def own_sizes(engine: Engine) -> dict[str, float]:
    """Sizes that are DeepSpeed's own, in elements."""
    whole = sys.modules["deepspeed"].runtime.engine.MEMORY_OPT_ALLREDUCE_SIZE
    live = engine.module.zero_max_live_parameters()
    return {"unbucketed": whole, "stepped": engine.module.zero_sub_group_size(), "live": live}


def stored(model: LanguageModel) -> list[Tensor]:
    """A rank's weights: parameters, or its parts of them at stage 3."""
    return [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]


def bucket_tensors(engine: Engine) -> list[Tensor]:
    """Buffers that ZeRO sums gradients through, those of them that are there."""
    outer = None if isinstance(engine, LocalEngine) else engine.module.optimizer
    buckets = getattr(outer, "ipg_buckets", {}).values()
    return [leaf for bucket in buckets for leaf in tree_leaves(bucket.buffer) if isinstance(leaf, Tensor)]


def optimizer_tensors(engine: Engine) -> Iterable[Tensor]:
    """What the optimizer updates, and its moments."""
    outer: Any = engine._optimizer if isinstance(engine, LocalEngine) else engine.module.optimizer
    states = getattr(outer, "optimizer", outer).state
    return [*states, *(value for state in states.values() for value in state.values())]
