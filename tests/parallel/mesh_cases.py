"""What a process sees of the axes of a started run."""

import os

import torch
import torch.distributed as dist
from torch import Tensor

from dla_train.config import Config, ConfigError, ParallelConfig, TrainConfig
from dla_train.parallel.axes import Axes, Axis
from dla_train.parallel.mesh import Mesh, end_axes, start_axes
from dla_train.parallel.regions import gather_along, total

NAMES = ("data", "tensor", "context", "batch")


def members(axes: Axes) -> dict[str, Tensor | float]:
    """The processes on each axis of this one, in the axis' order, and this one's place there."""
    own = torch.tensor([dist.get_rank()])
    found: dict[str, Tensor | float] = {"sequence": float(axes.sequence)}
    for name in NAMES:
        axis: Axis = getattr(axes, name)
        found |= {name: gather_along(own, axis, 0), f"{name} place": torch.tensor([axis.rank, axis.size])}
    return found


def config(tensor: int, context: int, sequence: bool = False) -> Config:
    parallel = ParallelConfig(tensor=tensor, context=context, sequence=sequence, timeout_minutes=0.5)
    return Config(train=TrainConfig(device="cpu"), parallel=parallel)


def several_meshes(axes: Axes) -> dict[str, Tensor | float]:
    """Meshes of different layouts one after the other, and threads left when they are gone."""
    found: dict[str, Tensor | float] = {}
    for round_ in range(3):
        for tensor, context in ((2, 1), (1, 2), (2, 2), (4, 1), (1, 1)):
            with Mesh.start(config(tensor, context, sequence=tensor > 1)) as mesh:
                places = [mesh.data_rank, mesh.data_size, mesh.axes.tensor.size, mesh.axes.context.size]
                sums = [mesh.sum(torch.ones(1), axis).item() for axis in (mesh.axes.batch, mesh.axes.tensor, None)]
                found[f"{tensor} {context}"] = torch.tensor([*places, mesh.axes.sequence, *sums])
        found[f"threads {round_}"] = float(len(os.listdir("/proc/self/task")))
    found["process group"] = float(dist.is_initialized())
    return found


def nested(axes: Axes) -> dict[str, Tensor | float | str]:
    """What a second mesh gets while the groups of a first exist."""
    found: dict[str, Tensor | float | str] = {}
    with Mesh.start(config(2, 1)) as outer:
        with Mesh.start(config(2, 1)) as inner:
            found["same group"] = float(inner.axes.tensor.group is outer.axes.tensor.group)
        found["alive"] = total(torch.ones(1), outer.axes.tensor)
        try:
            Mesh.start(config(1, 2))
        except RuntimeError as error:
            found["refused"] = str(error)
        with Mesh.start(config(1, 1)) as undivided:
            found["undivided"] = float(undivided.data_size)
    return found


def indivisible(axes: Axes) -> dict[str, str]:
    """The error of a layout that does not divide the processes."""
    try:
        start_axes(tensor=3, context=2)
    except ConfigError as error:
        return {"refused": str(error)}
    return {}


def group_of_one(axes: Axes) -> dict[str, float]:
    """Ending axes that have no groups of their own leaves the processes together."""
    undivided = start_axes()
    end_axes(undivided)
    return {"together": total(torch.ones(()), undivided.data).item()}
