"""`python -m dla_train.bench`: measure this machine's CPU and, where there is one, its GPU; or one of the programs.

python -m dla_train.bench                 the CPU's measurements; then the kernels' where there is a CUDA device
python -m dla_train.bench kernels ...     dla_kernels.bench
python -m dla_train.bench training ...    training steps of the paper's models
python -m dla_train.bench data ...        reading token files, and starts on a large corpus
python -m dla_train.bench prepare ...     tokenising text, over processes
python -m dla_train.bench render ...      pages and pictures from kernels.json and training.json, on any machine
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch


def main(arguments: list[str] | None = None) -> int:
    """Run the program that is named; returns the exit code. Each imports only what it needs itself."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["kernels"]:
        from dla_kernels.bench.__main__ import main as kernels

        return kernels(given[1:])
    if given[:1] == ["training"]:
        from dla_train.bench.training import main as training

        return training(given[1:])
    if given[:1] == ["data"]:
        from dla_train.bench.data import main as data

        return data(given[1:])
    if given[:1] == ["prepare"]:
        from dla_train.bench.prepare import main as prepare

        return prepare(given[1:])
    if given[:1] == ["render"]:
        from dla_train.bench.render import main as render

        return render(given[1:])
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
