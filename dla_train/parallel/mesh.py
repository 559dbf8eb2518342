"""The ranks of a run, its device, and the few collectives the trainer uses.

Owns the process group: this is the only place that makes or destroys one. A single process gets a group of one rank
(over an in-memory store, no port), so every caller takes the same path at any world size; a group that already exists
is used and left alone. Numbers travel in float64 and decisions as flags, so that every rank reads the same value at
the same step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dla_train.config import Config, ConfigError


@dataclass
class Mesh:
    """Data-parallel ranks and the device of this one. Use as a context manager: leaving it ends a group it made."""

    rank: int
    """This process, 0 to size - 1."""
    size: int
    """Processes of the run, all data-parallel."""
    device: torch.device
    """Where this rank computes."""
    owns_group: bool
    """Whether the process group was made here."""

    @classmethod
    def start(cls, config: Config) -> Mesh:
        """Join the ranks that torchrun started, or make a group of one. Raises ConfigError on an absent device."""
        device = pick_device(config.train.device)
        owns_group = not dist.is_initialized()
        if owns_group:
            _start_group(_group_backend(config.parallel.backend, device), config.parallel.timeout_minutes)
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), device=device, owns_group=owns_group)

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.owns_group:
            dist.destroy_process_group()

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` (any shape and dtype) over the ranks, the same on each; the input is left alone."""
        total = values.detach().to(self.device, copy=True)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def max(self, value: float) -> float:
        """Largest `value` of the ranks."""
        largest = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def any(self, flag: bool) -> bool:
        """Whether any rank raised `flag`; every rank gets the same answer."""
        return self.max(float(flag)) > 0

    def from_writer(self, value: Any) -> Any:
        """Rank 0's `value` (anything that pickles) on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


def pick_device(wanted: str) -> torch.device:
    """The device of `train.device`, on CUDA the one of this local rank. Raises ConfigError where there is no CUDA."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but PyTorch sees no CUDA device here; set train.device=cpu or auto")
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
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
