"""What a training step on the CPU really holds: tensors that autograd keeps, plans, states, and the peak of a step."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dla_train.config import Config
from dla_train.data.batch import Batch
from dla_train.models import LanguageModel
from dla_train.models.build import build_model
from dla_train.optim import build_optimizer
from dla_train.segments import SegmentedForward, segments_of


def model_of(config: Config) -> LanguageModel:
    """The run's model on the CPU, in training mode."""
    return build_model(config, "cpu").train()


def step_loss(model: LanguageModel, config: Config, *, packed: bool = False) -> Tensor:
    """The loss of random rows, of which a rank takes its part; `packed`: a second document begins inside every row."""
    rows, context = config.train.micro_batch_rows, config.data.context_tokens
    tokens = torch.randint(config.model.vocab_size, (rows, context + 1), generator=torch.Generator().manual_seed(0))
    given, wanted = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    edges = {row * context + start for row in range(rows) for start in ((0, context // 3) if packed else (0,))}
    offsets = torch.tensor(sorted({*edges, rows * context}))
    nats, partition, _ = model.token_loss(model(given, offsets).logits, wanted, config.optim.z_loss)
    return nats + partition


def bytes_of(tensors: Iterable[Tensor], without: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages under `tensors`, each once, but not of those under `without`."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in without}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for start, size in storages.items() if start not in left_out)


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes held between the forward and the backward pass, parameters left out."""

    blocks: int
    """By all blocks; of recomputed ones, their inputs."""
    head: int
    """By the embedding, the final norm and the head, without the loss."""
    loss: int
    plans: int = 0
    """By the memory plans alone, if nothing else held them."""


def held_after_forward(config: Config, *, packed: bool = False) -> Held:
    """Everything that autograd keeps of one micro-batch on one rank, and the plans apart."""
    model = model_of(config)
    _, held = held_in_a_step(model, config, packed=packed)
    return dataclasses.replace(held, plans=bytes_of(plan_tensors(model, config)))


def held_in_a_step(model: LanguageModel, config: Config, *, packed: bool = False) -> tuple[Tensor, Held]:
    """The loss of a micro-batch, and everything that autograd saves for it or its functions hold beside that."""
    saved: dict[str, list[Tensor]] = {"head": [], "blocks": [], "loss": []}
    part = ["head"]

    def keep(tensor: Tensor) -> Tensor:
        saved[part[0]].append(tensor)
        return tensor

    # A block that is recomputed saves its input before it is entered.
    model.embedding.register_forward_hook(lambda *_: part.__setitem__(0, "blocks"))
    model.final_norm.register_forward_pre_hook(lambda *_: part.__setitem__(0, "head"))
    model.register_forward_hook(lambda *_: part.__setitem__(0, "loss"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step_loss(model, config, packed=packed)
    saved["blocks"] += [] if model.recompute else held_by_functions(loss)
    weights = list(model.parameters())
    held = Held(
        blocks=bytes_of(saved["blocks"], weights),
        head=bytes_of(saved["head"], [*weights, *saved["blocks"]]),
        loss=bytes_of(saved["loss"], [*weights, *saved["blocks"], *saved["head"]]),
    )
    return loss, held


def held_by_functions(loss: Tensor) -> list[Tensor]:
    """Tensors that custom autograd functions hold as attributes, where no saved-tensor hook sees them."""
    found: list[Tensor] = []
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [tensor for value in getattr(node, "__dict__", {}).values() for tensor in tensors_in(value)]
        stack += [following for following, _ in node.next_functions]
    return found


def plan_tensors(model: LanguageModel, config: Config) -> list[Tensor]:
    """All tensors of every layer's memory plan after a forward pass, slot indices included."""
    model.recompute = False
    tokens = torch.zeros(config.train.micro_batch_rows, config.data.context_tokens, dtype=torch.int64)
    plans: list[Any] = []
    model(tokens, observe=lambda layer, reading: plans.append(reading.plan))
    return list(tensors_in(plans))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif dataclasses.is_dataclass(value):
        yield from tensors_in([getattr(value, field.name) for field in dataclasses.fields(value)])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is on, and the most that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor) or leaf.is_meta:
                continue
            if leaf.untyped_storage().data_ptr() not in given | self._known:
                self._enter(leaf.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        start, size = storage.data_ptr(), storage.nbytes()
        if size:
            self._known.add(start)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._leave, start, size)

    def _leave(self, start: int, size: int) -> None:
        self._known.discard(start)
        self.now -= size


def most_in_a_step(config: Config, *, packed: bool = False) -> int:
    """Most bytes alive at once in forward and backward of a second micro-batch, weights and gradients left out."""
    model = model_of(config)
    step_loss(model, config, packed=packed).backward()
    with LiveBytes() as live:
        if config.train.segment_tokens:
            step_in_segments(model, config)
        else:
            step_loss(model, config, packed=packed).backward()
    return live.most


def step_in_segments(model: LanguageModel, config: Config) -> None:
    """Forward and backward of a micro-batch of one document a row, segment by segment."""
    rows, context = config.train.micro_batch_rows, config.data.context_tokens
    tokens = torch.zeros(rows, context, dtype=torch.int64)
    batch = Batch(tokens, tokens, torch.arange(0, rows * context + 1, context, dtype=torch.int32))
    forward = SegmentedForward(model, torch.device("cpu"))
    for segment in segments_of(batch, config.train.segment_tokens):
        nats, partition, _ = model.token_loss(*forward(segment), config.optim.z_loss)
        (nats + partition).backward()


def state_bytes(config: Config) -> tuple[int, int, int]:
    """(weights, gradients, optimizer states) of the local engine's optimizer after a step."""
    model = model_of(config)
    optimizer = build_optimizer(model, config.optim)
    step_loss(model, config).backward()
    optimizer.step()
    weights = list(model.parameters())
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return bytes_of(weights), bytes_of([w.grad for w in weights if w.grad is not None]), bytes_of(moments)
