"""Worker functions that go wrong, to see it reported."""

import os
import signal

import torch.distributed as dist

from dla_train.parallel.axes import Axes


def fine(axes: Axes) -> dict[str, float]:
    return {"rank": float(dist.get_rank())}


def wrong_on_rank_1(axes: Axes, number: int) -> dict[str, float]:
    if dist.get_rank() == 1:
        raise ArithmeticError(f"{number} is wrong")
    dist.barrier()
    return {}


def killed_on_rank_0(axes: Axes) -> dict[str, float]:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return {}
