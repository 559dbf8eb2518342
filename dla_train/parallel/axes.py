"""Where a rank stands on every axis along which a run is divided.

Plain values that layers, data and engine read; mesh.py makes the ones with process groups. An axis of several ranks
without a group is a place in a layout that is only planned: shapes and shares follow from it, so a model of a run on
512 GPUs can be built on the meta device of a laptop, and communication over it raises instead of reaching the default
group, which is what torch does where it finds None.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, seen from one rank. Raises ValueError where `rank` does not lie in 0 to `size` - 1."""

    rank: int
    """This rank's place on the axis."""
    size: int
    """Ranks on the axis."""
    group: dist.ProcessGroup | None = field(default=None, repr=False)
    """Who communicates; None for a planned axis, and in a run of one process."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank} is not on an axis of size={self.size}; choose 0 to {self.size - 1}")

    @classmethod
    def single(cls) -> Axis:
        """The axis of a run that is not divided along it."""
        return cls(rank=0, size=1)

    def process_group(self) -> dist.ProcessGroup:
        """The group to communicate over. Raises RuntimeError where there is none."""
        if self.group is None:
            raise RuntimeError(
                f"this axis of {self.size} rank(s) has no process group: it was only planned; "
                "take the axes of a started mesh (mesh.start_axes)"
            )
        return self.group


@dataclass(frozen=True)
class Axes:
    """Every axis of a run, seen from one rank. Raises ValueError where `batch` is not data x context."""

    data: Axis
    """Copies of the model that read different rows."""
    tensor: Axis
    """Ranks that share one copy of the model by heads, features and vocabulary."""
    context: Axis
    """Ranks that share each row along time."""
    batch: Axis
    """data x context, context fastest: ranks that saw different tokens, over which gradients are summed."""
    sequence: bool = False
    """Whether the norm/residual region is divided along time over the tensor axis."""

    def __post_init__(self) -> None:
        if self.batch.size != self.data.size * self.context.size:
            raise ValueError(
                f"batch has {self.batch.size} ranks, but data x context has {self.data.size} x {self.context.size}"
            )

    @classmethod
    def single(cls) -> Axes:
        """The axes of one process."""
        return cls.planned()

    @classmethod
    def planned(
        cls, *, tensor: int = 1, context: int = 1, data: int = 1, sequence: bool = False, rank: int = 0
    ) -> Axes:
        """Axes without groups of process `rank` in a layout: tensor varies fastest, then context, then data.

        The same order as Megatron's, so that tensor ranks are neighbours on a node. Raises ValueError for a rank
        outside the layout.
        """
        if not 0 <= rank < tensor * context * data:
            raise ValueError(f"rank={rank} is not one of the {tensor} x {context} x {data} ranks of the layout")
        batch = Axis(rank // tensor, context * data)
        return cls(
            data=Axis(batch.rank // context, data),
            tensor=Axis(rank % tensor, tensor),
            context=Axis(batch.rank % context, context),
            batch=batch,
            sequence=sequence,
        )
