"""Does a change leave training as it was, to the last bit? `python -m tests.same_training --base REV`.

The code of REV, in a work tree of its own, and the code that is here train the same small models. Compared are every
number of their metrics that no clock made, and every tensor of their last checkpoints. Exit code 1 says what differs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.train.runs import ROOT, TINY, tensors_of, write_corpus

CASES = {
    "gated_deltanet dla": ("memory=dla",),
    "gated_deltanet dla_rate": ("memory=dla_rate_small", "train.segment_tokens=16", "data.packing=best_fit"),
    "gated_deltanet dla_learned": ("memory=dla_learned", "memory.gate=straight_through", "train.recompute=true"),
    "mamba2 dla": ("model.backbone=mamba2", "memory=dla"),
    "mamba2 dla_frozen": ("model.backbone=mamba2", "memory=dla_frozen", "train.dtype=bfloat16"),
    "mamba2 log_linear": ("model.backbone=mamba2", "memory=log_linear", "memory.capacity=7"),
    "gated_deltanet single": ("memory=single", "optim.schedule=wsd", "optim.decay_steps=2"),
    "gated_deltanet fixed": ("memory=fixed", "memory.interval_tokens=4"),
    "transformer": ("model.backbone=attention", "memory=none", "model.conv_width=0"),
}
"""Settings by name."""
STEPS = 8
CLOCKED = ("seconds", "tokens_per_second", "memory_bytes", "overhead", "utilisation", "flops")
"""Parts of names of numbers that differ from run to run."""


def train(tree: Path, corpus: list[str], folder: Path, settings: tuple[str, ...]) -> None:
    """One run by the code of `tree`."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": "1"}
    words = ["experiment=quickstart", *TINY, f"train.steps={STEPS}", *corpus, *settings, f"run_dir={folder}"]
    words += ["checkpoint=end", "train.validation_interval_steps=4", "train.device=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "dla_train.train", *words], env=environment, cwd=tree, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{tree}: {' '.join(settings)} failed:\n{done.stderr[-2000:]}")


def numbers(folder: Path) -> list[dict[str, float]]:
    """The metrics' lines without what a clock made."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: x for key, x in line.items() if not any(part in key for part in CLOCKED)} for line in lines]


def first_difference(before: Path, after: Path) -> str:
    """What two runs differ in first; empty if in nothing."""
    old, new = numbers(before), numbers(after)
    for earlier, later in zip(old, new, strict=True):
        for key in sorted(set(earlier) | set(later)):
            a, b = earlier.get(key), later.get(key)
            if a != b and not (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)):
                return f"step {earlier['step']}: {key} was {a} and is {b}"
    tensors, others = tensors_of(before, STEPS), tensors_of(after, STEPS)
    if set(tensors) != set(others):
        return f"tensors only in one: {sorted(set(tensors) ^ set(others))}"
    return next((f"tensor {name}" for name, x in tensors.items() if not torch.equal(x, others[name])), "")


def main() -> int:
    """Compare, print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="HEAD", help="revision to compare with (default: the last commit)")
    base, differ = parser.parse_args().base, 0
    with tempfile.TemporaryDirectory() as name:
        folder, tree = Path(name), Path(name) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(tree), base], check=True, cwd=ROOT)
        try:
            corpus = write_corpus(folder / "corpus")
            for index, (case, settings) in enumerate(CASES.items()):
                runs = folder / f"before{index}", folder / f"after{index}"
                for code, run in zip((tree, ROOT), runs, strict=True):
                    train(code, corpus, run, settings)
                difference = first_difference(*runs)
                differ += bool(difference)
                print(f"{case}: {difference or 'the same'}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True, cwd=ROOT)
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
