"""Several runs in one process per rank: `worker.py SPEC`, SPEC a JSON list of {"overrides": [...]} in the order to run.

Started plain or under torchrun. Sharing one process between runs saves the seconds that importing takes; the process
group is made once, because DeepSpeed keeps references to the first one it sees.
"""

import json
import sys
from pathlib import Path

import torch

from dla_train.hydra_app import compose
from dla_train.parallel.mesh import Mesh
from dla_train.train import train


def main() -> None:
    torch.set_num_threads(1)
    configs = [compose(overrides) for overrides in json.loads(Path(sys.argv[1]).read_text())]
    stages = {config.engine.zero_stage for config in configs if config.engine.name == "deepspeed"}
    with Mesh.start(configs[0]) as mesh:
        for config in configs:
            result = train(config)
            if mesh.is_writer:
                print(config.name, result.step, result.loss, flush=True)
    if 3 not in stages:  # whose parameters hold their group for as long as the process lives
        check_groups_have_ended()


def check_groups_have_ended() -> None:
    """A thread of a group that is at work while the interpreter ends aborts it, after everything went well."""
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.is_dir() else []
    assert not [name for name in names if "gloo" in name], names


if __name__ == "__main__":
    main()
