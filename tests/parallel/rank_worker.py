"""One rank of `ranks.run_on_ranks`: `rank_worker MODULE SPEC DEVICE`, SPEC a JSON list of checks; writes beside SPEC.

<index>.<rank>.pt is what a check returned, <index>.<rank>.failed the traceback of one that raised. An exception then
ends the rank, and with it the run: the other ranks may be waiting for this one in a collective.
"""

import gc
import importlib
import itertools
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from dla_train.parallel.mesh import end_axes, start_axes
from tests.parallel import ranks


def main() -> None:
    module, spec = importlib.import_module(sys.argv[1]), Path(sys.argv[2])
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    if sys.argv[3] == "cuda":
        ranks.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(ranks.device)
    backend = "gloo" if ranks.device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    checks = sorted(enumerate(json.loads(spec.read_text())), key=lambda numbered: layout_of(numbered[1]))
    for layout, of_layout in itertools.groupby(checks, key=lambda numbered: layout_of(numbered[1])):
        axes = start_axes(*layout)
        groups = set(dist.distributed_c10d._world.pg_map)
        for index, check in of_layout:
            run_check(module, check, f"{spec.parent}/{index}.{dist.get_rank()}")
            end_groups_of_engines(but=groups)
        end_axes(axes)
    dist.destroy_process_group()


def layout_of(check: dict[str, Any]) -> tuple[int, int]:
    """What decides which groups there are; making them takes a quarter of a second, so checks share them."""
    return check["tensor"], check["context"]


def run_check(module: ModuleType, check: dict[str, Any], written: str) -> None:
    """Call a check's function with its axes, on the groups that stand, and write what it returned or raised."""
    try:
        axes = start_axes(*layout_of(check), check["sequence"])
        result = getattr(module, check["function"])(axes, **check["arguments"])
    except Exception:
        Path(f"{written}.failed").write_text(traceback.format_exc())
        raise
    torch.save(result, f"{written}.part")
    Path(f"{written}.part").rename(f"{written}.pt")  # another rank's failure may end this one at any moment


def end_groups_of_engines(but: set[dist.ProcessGroup]) -> None:
    """Destroy the groups that DeepSpeed's engines made: hundreds of them, with their threads, would slow every rank."""
    gc.collect()
    gc.freeze()  # what lives on, such as imported modules, is not looked at again
    deepspeed = sys.modules.get("deepspeed.comm.comm")
    for group in [group for group in dist.distributed_c10d._world.pg_map if group not in but]:
        (deepspeed or dist).destroy_process_group(group)


if __name__ == "__main__":
    main()
