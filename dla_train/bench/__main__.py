"""`python -m dla_train.bench`: measure this machine's CPU and, where there is one, its GPU; or one of the programs.

python -m dla_train.bench                 the CPU's measurements; then the kernels' where there is a CUDA device
python -m dla_train.bench kernels ...     dla_kernels.bench
python -m dla_train.bench training ...    training steps of the paper's models
python -m dla_train.bench checkpoint ...  saving and resuming on this machine's disk
python -m dla_train.bench data ...        reading token files, and starts on a large corpus
python -m dla_train.bench layouts ...     what the trainer adds on four ranks of this machine's CPU
python -m dla_train.bench decode ...      a token and its caches at contexts from 1K to 64K
python -m dla_train.bench prepare ...     tokenising text, over processes
python -m dla_train.bench scoring ...     log-likelihoods of dla-evaluate against plain forwards
python -m dla_train.bench sweep ...       how busy a sweep keeps this machine's cores
python -m dla_train.bench render ...      pages and pictures from kernels.json and training.json, on any machine
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

PROGRAMS = {
    "kernels": "dla_kernels.bench.__main__",
    "training": "dla_train.bench.training",
    "checkpoint": "dla_train.bench.checkpoint",
    "data": "dla_train.bench.data",
    "decode": "dla_train.bench.decode",
    "prepare": "dla_train.bench.prepare",
    "layouts": "dla_train.bench.layouts",
    "scoring": "dla_train.bench.scoring",
    "sweep": "dla_train.bench.sweep",
    "render": "dla_train.bench.render",
}
"""Modules of the programs, whose `main(arguments)` returns the exit code. Each imports only what it needs itself."""


def main(arguments: list[str] | None = None) -> int:
    """Run the program that is named, or all that suits this machine; returns the exit code, 2 where there is none."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in PROGRAMS:
        return int(importlib.import_module(PROGRAMS[given[0]]).main(given[1:]))
    if given and not given[0].startswith("-"):
        programs = ", ".join(PROGRAMS)
        print(f"python -m dla_train.bench: error: {given[0]} is no program; choose from {programs}", file=sys.stderr)
        return 2
    return _everything(given)


def _everything(arguments: list[str]) -> int:
    from dla_train.bench.cpu import measure_cpu

    parser = argparse.ArgumentParser(
        prog="python -m dla_train.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="training steps timed (default %(default)s)")
    options = parser.parse_args(arguments)
    measure_cpu(options.output, rounds=options.rounds, steps=options.steps)
    if not torch.cuda.is_available():
        print("The kernels were not measured: they need a CUDA device, and PyTorch sees none here.")
        return 0
    from dla_kernels.bench.__main__ import main as kernels
    from dla_train.bench.render import main as render

    return kernels([f"--output={options.output}"]) or render([f"--results={options.output}"])


if __name__ == "__main__":
    sys.exit(main())
