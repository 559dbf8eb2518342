"""Bytes that a rank sends in collectives, whoever calls them: counted where torch hands them to a process group."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVES = {
    "allreduce_": (2, 0),
    "allgather_": (1, 0),
    "_allgather_base_": (1, 0),
    "allgather_into_tensor_coalesced_": (1, 0),
    "reduce_scatter_": (1, 1),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
    "reduce_": (1, 0),
    "broadcast_": (1, 0),
    "alltoall_base_": (1, 1),
}
"""How often a ring of R ranks sends (R - 1) / R of which argument: a gather's result, all else's input."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """One collective."""

    operation: str
    group: str
    bytes: float


class SentBytes(TorchDispatchMode):
    """Lists every collective while it is on. Raises KeyError at one whose volume is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Sent] = []

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, operation = function._schema.name.partition("::")  # type: ignore[attr-defined]
        if namespace == "c10d" and operation != "barrier":
            times, which = COLLECTIVES[operation]
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if is_group(arg))
            whole = sum(leaf.nbytes for leaf in tree_leaves(args[which]) if isinstance(leaf, Tensor))
            self.found.append(Sent(operation, group.group_name, times * (group.size() - 1) / group.size() * whole))
        return function(*args, **(kwargs or {}))

    def over(self, group: dist.ProcessGroup | None) -> float:
        """Bytes sent over one group."""
        return sum(sent.bytes for sent in self.found if group is not None and sent.group == group.group_name)


def is_group(argument: object) -> bool:
    """Whether an argument of a collective is its process group; others are its kind of sum and its options."""
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())
