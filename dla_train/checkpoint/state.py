"""What of a run becomes tensors: whole, float32, under logical names; and this rank's copy of its share of them.

`model/<name>`, `optim/<name>/exp_avg`, `optim/<name>/exp_avg_sq` have global shapes and know nothing of ranks or
engines; `rng/<rank>/<device>` is each rank's random state. Whole tensors are dealt to the ranks so that every rank
copies about the same number of bytes: on the host a save takes 12 bytes a parameter, divided by the ranks. Nothing is
cut into pieces, because engines hand over whole tensors anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dla_train.checkpoint.errors import CheckpointError, DamagedError
from dla_train.checkpoint.manifest import deal
from dla_train.checkpoint.tensor_files import StoredTensors
from dla_train.logical_state import LogicalState

SHOWN_DIFFERENCES = 4
"""Differences named in one error."""
PREFIXES = ("model/", "optim/")
"""Names of an engine's state start with one of these."""


class Staging:
    """This rank's host copies, in buffers kept from save to save; on CUDA they are pinned, so copies overlap."""

    def __init__(self, rank: int, ranks: int, device: torch.device) -> None:
        self._rank, self._ranks, self._device = rank, ranks, device
        self._buffers: dict[str, Tensor] = {}

    def copy(self, source: LogicalState) -> dict[str, Tensor]:
        """This rank's share and its random state; valid until the next call. Collective.

        The copies are complete on return: what the optimizer does afterwards cannot reach them.
        """
        mine = set(deal({name: math.prod(shape) for name, shape in source.shapes().items()}, self._ranks)[self._rank])
        for name, tensor in source.export_state():
            if name in mine:
                self._buffer(name, tensor).copy_(tensor.detach(), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        copied = {name: self._buffers[name] for name in sorted(mine)}
        return copied | random_state(self._rank, self._device)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        if like.dtype != torch.float32:
            raise TypeError(f"{name} is {like.dtype}; checkpoints hold float32 only")
        if name not in self._buffers:
            pinned = self._device.type == "cuda"
            self._buffers[name] = torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
        return self._buffers[name]


def check_shapes(folder: Path, stored: StoredTensors, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError, naming the first differences, unless the engine's tensors stored are just the `wanted`."""
    entries = {name: stored.entry(name) for name in stored if name.startswith(PREFIXES)}
    for name, (dtype, _) in entries.items():
        if dtype != "F32":
            raise DamagedError(f"{folder} holds {name} as {dtype}; checkpoints of this program hold F32 only")
    there = {name: shape for name, (_, shape) in entries.items()}
    differences = [
        f"{name} is {_shape(there.get(name))} there and {_shape(wanted.get(name))} here"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]
    if differences:
        more = f" and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
        raise CheckpointError(
            f"{folder} holds another model: {'; '.join(differences[:SHOWN_DIFFERENCES])}{more}. "
            "Use the configuration it was trained with, or another run_dir"
        )


def random_state(rank: int, device: torch.device) -> dict[str, Tensor]:
    """PyTorch's random state of this rank. Python's and NumPy's global generators are not used by the trainer."""
    state = {f"rng/{rank}/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"rng/{rank}/cuda"] = torch.cuda.get_rng_state(device)
    return state


def stored_random_state(
    folder: Path, stored: Mapping[str, Tensor], rank: int, device: torch.device
) -> dict[str, Tensor]:
    """What `random_state` saved for this rank and device, tried on a spare generator. Raises DamagedError.

    Empty for a rank that the saved run did not have: it keeps its own.
    """
    found = {}
    for kind in {"cpu", device.type}:
        name = f"rng/{rank}/{kind}"
        if name in stored:
            found[kind] = stored[name].clone()
            try:
                torch.Generator(device if kind == "cuda" else "cpu").set_state(found[kind])
            except (RuntimeError, TypeError) as error:
                raise DamagedError(f"{folder} is damaged: {name} is no random state: {error}") from error
    return found


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Set what `stored_random_state` gave."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
