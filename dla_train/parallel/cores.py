"""Which cores a rank computes on: those near its GPU, a part of them that is its own, or all that it was given.

A process whose threads and memory lie at the other socket reaches its GPU and its pinned buffers over the link between
them. `dla-launch` says what to do by DLA_BIND (`launcher.bind`). torchrun's own --numa-binding needs numactl, a GPU and
PyTorch 2.9, and ends the run where one is absent; this asks the kernel, and leaves a rank as it is where none tells.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dla_train.config import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "DLA_BIND"
CHOICES = ("node", "share", "none")
SYSTEM = Path("/sys")


def bind_cores(device: torch.device) -> None:
    """Bind this process to its cores, as DLA_BIND says, once: its children inherit them. Linux only.

    Raises ConfigError on another value.
    """
    how = os.environ.pop(VARIABLE, "none")
    if how not in CHOICES:
        raise ConfigError(f"{VARIABLE}={how} is not a way to bind ranks; choose from {', '.join(CHOICES)}")
    if how == "none" or not hasattr(os, "sched_setaffinity"):
        return
    place, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    allowed = frozenset(os.sched_getaffinity(0))
    nodes = [gpu_node(rank % torch.cuda.device_count()) if device.type == "cuda" else None for rank in range(ranks)]
    chosen = choose_cores(how, place, nodes, allowed)
    if chosen == allowed:
        return
    for thread in os.listdir("/proc/self/task"):  # libraries that are imported by now have begun some
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), chosen)
    logger.info("local rank %d computes on cores %s (launcher.bind=%s)", place, as_ranges(chosen), how)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_cores(
    how: str, place: int, nodes: Sequence[int | None], allowed: frozenset[int], system: Path = SYSTEM
) -> frozenset[int]:
    """Cores of the local rank `place`, never none.

    nodes: NUMA node of each local rank's GPU, None where there is none or it is not known.
    """
    near = _cores_of_node(nodes[place], system) & allowed
    pool = near or allowed
    if how == "node":
        return pool
    peers = [rank for rank, node in enumerate(nodes) if not near or node == nodes[place]]
    whole = sorted({_siblings(core, system) & pool for core in pool}, key=min)
    if len(whole) < len(peers):
        return pool
    index, count = peers.index(place), len(peers)
    own = whole[index * len(whole) // count : (index + 1) * len(whole) // count]
    return frozenset().union(*own)


def gpu_node(index: int, system: Path = SYSTEM) -> int | None:
    """NUMA node of a visible GPU; None where the kernel or PyTorch does not tell."""
    properties = torch.cuda.get_device_properties(index)
    places = [getattr(properties, f"pci_{part}_id", -1) for part in ("domain", "bus", "device")]
    address = "{:04x}:{:02x}:{:02x}.0".format(*places)  # of no file where this PyTorch does not tell
    file = system / "bus/pci/devices" / address / "numa_node"
    node = int(file.read_text()) if file.is_file() else -1
    return node if node >= 0 else None  # the kernel's own word for "not known" is -1


def as_ranges(cores: frozenset[int]) -> str:
    """`0-3,8`, as the kernel writes them."""
    ends: list[list[int]] = []
    for core in sorted(cores):
        if ends and core == ends[-1][1] + 1:
            ends[-1][1] = core
        else:
            ends.append([core, core])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ends)


def _cores_of_node(node: int | None, system: Path) -> frozenset[int]:
    return frozenset() if node is None else _read_ranges(system / f"devices/system/node/node{node}/cpulist")


def _siblings(core: int, system: Path) -> frozenset[int]:
    """The threads of the core that `core` is one of."""
    return _read_ranges(system / f"devices/system/cpu/cpu{core}/topology/thread_siblings_list") or frozenset({core})


def _read_ranges(file: Path) -> frozenset[int]:
    """The numbers in a file of the kernel, such as 0-3,8; none where there is no file."""
    ranges = [part.partition("-") for part in file.read_text().strip().split(",") if part] if file.is_file() else []
    return frozenset(core for low, _, high in ranges for core in range(int(low), int(high or low) + 1))
