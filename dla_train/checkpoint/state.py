"""Tensors of a checkpoint: whole, float32, under logical names, in PyTorch's distributed checkpoint format.

`model/<name>`, `optim/<name>/exp_avg`, `optim/<name>/exp_avg_sq` have global shapes and know nothing of ranks or
engines; `rng/<rank>/<device>` is each rank's random state. Each rank writes the tensors dealt to it in turn, so that
the host memory of a save shrinks with the number of ranks; every rank reads what it asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dla_train.checkpoint.folders import CheckpointError

SHOWN_DIFFERENCES = 4
"""Differences named in one error."""


class LogicalState(Protocol):
    """What a checkpoint holds of an engine (see dla_train/engine.py)."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor, by logical name."""

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        """(logical name, whole tensor), one by one, on every rank in the same order."""

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Load all tensors and continue as after `steps` optimizer steps."""


def collect(source: LogicalState, rank: int, ranks: int) -> dict[str, Tensor]:
    """This rank's share of the exported tensors, copied to the CPU."""
    share = {}
    for index, (name, tensor) in enumerate(source.export_state()):
        if index % ranks == rank:
            share[name] = tensor.detach().to("cpu", copy=True)
    return share


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write every rank's share into `folder` (collective); names must be distinct over the ranks."""
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder, thread_count=1))


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and type of every tensor stored in `folder`, by name."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    return {
        name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """The named tensors, whole, on the CPU. Needs no process group; each rank reads for itself."""
    stored = stored_tensors(folder)
    tensors = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in names}
    reader, planner = dcp.FileSystemReader(folder), dcp.DefaultLoadPlanner()
    metadata = reader.read_metadata()
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    reader.read_data(plan, planner).wait()
    return tensors


def check_shapes(folder: Path, wanted: dict[str, tuple[int, ...]], prefixes: tuple[str, ...]) -> None:
    """Raise CheckpointError, naming the first differences, unless `folder` holds exactly the `wanted` tensors.

    Compared are names that start with one of `prefixes`, e.g. `("model/", "optim/")`.
    """
    stored = {name: tuple(entry.size) for name, entry in stored_tensors(folder).items() if name.startswith(prefixes)}
    differences = [
        f"{name} is {_shape(stored.get(name))} there and {_shape(wanted.get(name))} here"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
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


def restore_random_state(state: Mapping[str, Tensor], rank: int, device: torch.device) -> None:
    """Set what `random_state` saved; a rank that the saved run did not have keeps its own."""
    if f"rng/{rank}/cpu" in state:
        torch.set_rng_state(state[f"rng/{rank}/cpu"])
    if device.type == "cuda" and f"rng/{rank}/cuda" in state:
        torch.cuda.set_rng_state(state[f"rng/{rank}/cuda"], device)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
