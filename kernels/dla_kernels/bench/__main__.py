"""Command line of the benchmark; see the package's docstring for a whole session."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from dla_kernels.bench.session import RESULTS, Options, Session, compile_one_of
from dla_kernels.bench.tables import markdown

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
TOY_LENGTHS = (16, 32, 64)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results; exit code 2 where there is no such device."""
    parser = argparse.ArgumentParser(
        prog="python -m dla_kernels.bench", description="Speed and memory of the operations on one GPU."
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder (default %(default)s)")
    parser.add_argument("--tokens", type=int, help="B * T of every measurement (default 131072; toy 64)")
    parser.add_argument("--lengths", help="sequence lengths, comma separated (default 2048 to 131072 by doubling)")
    parser.add_argument("--arms", default="", help="patterns of shape/arm, e.g. 'mamba2/dla_k30*,*/decode'")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing beyond (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each arm (default %(default)s)")
    parser.add_argument(
        "--workers", type=int, help="processes that compile first (default one a core, at most 16; on a CPU 0)"
    )
    parser.add_argument("--backend", help="triton or torch (default: triton on CUDA, torch elsewhere)")
    parser.add_argument("--toy", action="store_true", help="small shapes, to try the program itself")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "error: --device cuda, but PyTorch sees no CUDA device; --toy --device cpu tries the program",
            file=sys.stderr,
        )
        return 2
    tokens = given.tokens or (max(TOY_LENGTHS) if given.toy else max(LENGTHS))
    lengths = [int(t) for t in given.lengths.split(",")] if given.lengths else TOY_LENGTHS if given.toy else LENGTHS
    workers = min(16, os.cpu_count() or 1) if device.type == "cuda" else 0
    options = Options(
        device=device,
        output=given.output,
        tokens=tokens,
        lengths=[t for t in lengths if t <= tokens],
        patterns=[pattern for pattern in given.arms.split(",") if pattern],
        minutes=given.minutes,
        rounds=given.rounds,
        workers=workers if given.workers is None else given.workers,
        backend=given.backend,
        toy=given.toy,
    )
    if given.compile_part:
        index, workers = map(int, given.compile_part.split("/"))
        compile_one_of(options, index, workers)
        return 0
    results = Session(options).run()
    print(markdown(results))
    print(f"written to {options.output / RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
