"""The ranks of a run, its device, and the few collectives the trainer uses.

Owns the process groups: this is the only place that makes or destroys one. A single process gets a group of one rank
(over an in-memory store, no port), so every caller takes the same path at any world size; a group that already exists
is used and left alone. Every rank reads the same number, and so takes the same decision, at the same step.

The groups of tensor and context parallelism are megatron-core's (tensor ranks are neighbours, then context, then data),
made only where one of them is above 1: importing megatron takes seconds.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its defaults would hold a group that exists when it is first imported
from torch import Tensor

from dla_train.config import Config, ConfigError
from dla_train.layout_rules import divisors, listed
from dla_train.parallel.axes import Axes, Axis
from dla_train.parallel.cores import bind_cores

Made = TypeVar("Made")


@dataclass
class Mesh:
    """The ranks of a run and the device of this one. Use as a context manager: leaving it ends the groups it made."""

    rank: int
    """This process, 0 to size - 1."""
    size: int
    """Processes of the run."""
    device: torch.device
    """Where this rank computes."""
    owns_group: bool
    """Whether the process group was made here."""
    axes: Axes = field(default_factory=Axes.single)
    """This process's place on each axis along which the run is divided."""
    owns_axes: bool = False
    """Whether the groups of `axes` were made here."""

    @classmethod
    def start(cls, config: Config) -> Mesh:
        """Join the ranks that torchrun started, or make a group of one.

        Raises ConfigError on an absent device and where tensor and context do not divide the ranks.
        """
        parallel, device = config.parallel, pick_device(config.train.device)
        bind_cores(device)
        owns_group = not dist.is_initialized()
        with ExitStack() as undo:
            if owns_group:
                _start_group(_group_backend(parallel.backend, device), parallel.timeout_minutes)
                undo.callback(dist.destroy_process_group)
            axes, owns_axes = _divide(parallel.tensor, parallel.context, parallel.sequence, parallel.timeout_minutes)
            undo.pop_all()
        return cls(dist.get_rank(), dist.get_world_size(), device, owns_group, axes, owns_axes)

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *exception: object) -> None:
        axes, self.axes = self.axes, Axes.single()  # a group that is held until the interpreter ends would abort it
        if self.owns_axes:
            end_axes(axes)
        del axes
        if self.owns_group:
            gc.collect()  # models and engines hold groups, and are cycles
            _end_group()

    @property
    def data_rank(self) -> int:
        """Which rows this process reads: 0 to data_size - 1."""
        return self.axes.data.rank

    @property
    def data_size(self) -> int:
        """Into how many parts the rows of a batch are divided."""
        return self.axes.data.size

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Tensor, axis: Axis | None = None) -> Tensor:
        """Sum of `values` (any shape and dtype) over `axis` (default: all processes), the same on each of its ranks.

        The input is left alone.
        """
        total = values.detach().to(self.device, copy=True)
        if axis is not None and axis.size > 1:
            dist.all_reduce(total, group=axis.process_group())
        elif axis is None and self.size > 1:
            dist.all_reduce(total)
        return total

    def max(self, value: float) -> float:
        """Largest `value` of the ranks, through the host: no device is waited for."""
        largest = torch.tensor(value, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def from_writer(self, value: Any) -> Any:
        """Rank 0's `value` (anything that pickles) on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_writer(self, make: Callable[[], Made], errors: tuple[type[Exception], ...] = ()) -> Made:
        """What `make` gives on rank 0, the only one that calls it, on every rank; one of `errors` is raised on all."""
        made: Any = None
        if self.is_writer:
            try:
                made = make()
            except errors as error:
                made = error
        made = self.from_writer(made)
        if isinstance(made, Exception):
            raise made
        return cast(Made, made)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (anything that pickles), by rank, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


def start_axes(tensor: int = 1, context: int = 1, sequence: bool = False, timeout_minutes: float = 10.0) -> Axes:
    """Divide the processes of the started group into tensor x context x data ranks; `end_axes` undoes it. Collective.

    Groups of the same layout that exist already are used. `sequence` is noted, it needs no group. Raises ConfigError
    where tensor x context does not divide the processes, RuntimeError where groups of another layout exist.
    """
    return _divide(tensor, context, sequence, timeout_minutes)[0]


def end_axes(axes: Axes) -> None:
    """Destroy the groups that `start_axes` made, of which some are megatron's alone; the process group stays."""
    if axes.tensor.size * axes.context.size == 1:
        return
    groups = _parallel_state()
    made = groups._global_process_group_list  # megatron forgets its groups without destroying them
    for group in made[1:]:  # the first stands for the process group itself
        dist.destroy_process_group(group)
    groups.destroy_model_parallel()
    vars(groups)["_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"] = None  # the one that it forgets to forget


def pick_device(wanted: str, key: str = "train.device") -> torch.device:
    """The device that the setting `key` wants, on CUDA the one of this local rank.

    Raises ConfigError where there is no CUDA.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key}=cuda, but PyTorch sees no CUDA device here; set {key}=cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _group_backend(wanted: str, device: torch.device) -> str:
    """The backend string of init_process_group: on CUDA, CPU tensors still need gloo (objects, checkpoint plans)."""
    if wanted == "nccl" and device.type == "cpu":
        raise ConfigError("parallel.backend=nccl needs CUDA, but this run is on the CPU; set it to gloo or auto")
    if wanted == "gloo" or device.type == "cpu":
        return "gloo"
    return "cpu:gloo,cuda:nccl"


def _start_group(backend: str, timeout_minutes: float) -> None:
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=store_of_this_start(store), rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def store_of_this_start(store: dist.Store) -> dist.Store:
    """The store without the addresses of ranks that have ended.

    torchrun keeps its store when it starts ranks again. Its counts of restarts are each machine's own, so they tell
    starts apart on one machine only; on several, dla-launch makes torchrun open a store for each start.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _end_group() -> None:
    """Destroy every group; deepspeed, if an engine imported it, lets go of those it keeps."""
    deepspeed = sys.modules.get("deepspeed.comm.comm")
    if deepspeed is not None and deepspeed.is_initialized():
        deepspeed.destroy_process_group()
    else:
        dist.destroy_process_group()


def _divide(tensor: int, context: int, sequence: bool, timeout_minutes: float) -> tuple[Axes, bool]:
    """`start_axes`, and whether groups were made for it."""
    ranks = dist.get_world_size()
    if ranks % (tensor * context):
        raise ConfigError(
            f"parallel.tensor={tensor} x parallel.context={context} does not divide the {ranks} processes of this run; "
            f"start a multiple of {tensor * context}, or choose a product from {listed(divisors(ranks))}"
        )
    if tensor * context == 1:
        every = Axis.single() if ranks == 1 else _axis(dist.group.WORLD)
        return Axes(data=every, tensor=Axis.single(), context=Axis.single(), batch=every, sequence=sequence), False
    groups = _parallel_state()
    exist = groups.model_parallel_is_initialized()
    if exist:
        _check_same_layout(groups, tensor, context)
    else:
        groups.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            context_parallel_size=context,
            create_gloo_process_groups=False,  # a second copy of the data groups that nothing here uses
            distributed_timeout_minutes=timeout_minutes,
        )
    axes = Axes(
        data=_axis(groups.get_data_parallel_group()),
        tensor=_axis(groups.get_tensor_model_parallel_group()),
        context=_axis(groups.get_context_parallel_group()),
        batch=_axis(groups.get_data_parallel_group(with_context_parallel=True)),
        sequence=sequence,
    )
    return axes, not exist


def _axis(group: dist.ProcessGroup | None) -> Axis:
    """This rank's place in a group."""
    return Axis(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)


def _parallel_state() -> ModuleType:
    with warnings.catch_warnings():
        # its import warns about absent Apex and Transformer Engine, of which only the groups are used here, and,
        # inside torch, about torch.jit
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        from megatron.core import parallel_state
    return parallel_state


def _check_same_layout(groups: ModuleType, tensor: int, context: int) -> None:
    started = (groups.get_tensor_model_parallel_world_size(), groups.get_context_parallel_world_size())
    if started != (tensor, context):
        raise RuntimeError(
            f"parallel.tensor={tensor} and parallel.context={context} were asked for while groups of tensor="
            f"{started[0]} and context={started[1]} exist; leave the mesh that made them first"
        )
