"""Do tests notice when a central line is wrong? `python -m tests.mutations [NAME ...]`.

Each line of MUTATIONS is changed in a copy of the tree, and the tests named beside it run there. A mutation that none
of them fails at has survived: exit code 1 names it. `tests/test_house.py` holds that every line is still there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """One wrong line, and where it should be noticed."""

    name: str
    file: str
    right: str
    """Text that the file has once."""
    wrong: str
    tests: str


_DRIFT, _STEP = "kernels/dla_kernels/memory/drift.py", "kernels/dla_kernels/step.py"
MUTATIONS = (
    Mutation(
        "score",
        _DRIFT,
        "return (2 - 2 * cosine).clamp_min(0).sqrt()",
        "return 1 - cosine",
        "tests/kernels/test_plan.py",
    ),
    Mutation(
        "boundary",
        _DRIFT,
        "hit = ((score >= tau[..., None, None]) | forced",
        "hit = ((score > tau[..., None, None]) | forced",
        "tests/kernels/test_plan.py",
    ),
    Mutation(
        "merge argmin",
        "kernels/dla_kernels/memory/merging.py",
        "torch.argmin(density if",
        "torch.argmax(density if",
        "tests/kernels/test_plan.py",
    ),
    Mutation(
        "adjacency",
        _STEP,
        "(slot > pair[..., None]), slot - 1",
        "(slot > pair[..., None] + 1), slot - 1",
        "tests/kernels/test_cache.py",
    ),
    Mutation(
        "transition",
        "kernels/dla_kernels/backbones/operators.py",
        "return matrix @ (cum.exp()[..., None] * k)",
        "return matrix @ k",
        "tests/kernels/test_cache.py",
    ),
    Mutation(
        "gate",
        "kernels/dla_kernels/memory/gates.py",
        "gated.append(p * weights[..., rank] + (1.0 - p) * gated[-1])",
        "gated.append(p * weights[..., rank] + (1.0 - p) * weights[..., rank - 1])",
        "tests/kernels/test_reads.py",
    ),
    Mutation(
        "reduction",
        "dla_train/parallel/regions.py",
        "    dist.all_reduce(summed, group=axis.process_group())\n",
        "",
        "tests/parallel/test_regions.py",
    ),
    Mutation(
        "split table",
        "dla_train/parallel/sections.py",
        'Section("*.mixer.out.weight", "heads", dim=1)',
        'Section("*.mixer.out.weight", "heads")',
        "tests/parallel/test_models.py",
    ),
    Mutation(
        "marker",
        "dla_train/checkpoint/folders.py",
        "for step, folder in folders if os.path.lexists(folder / MARKER)]",
        "for step, folder in folders]",
        "tests/checkpoint/test_folders.py",
    ),
    Mutation(
        "cursor",
        "dla_train/data/cursor.py",
        '"tokens": tokens, **asdict(source.position(rows))}',
        '"tokens": tokens, **asdict(source.position(rows + 1))}',
        "tests/data",
    ),
)


def mutate(tree: Path, mutation: Mutation) -> None:
    """Write the wrong line. Raises ValueError where the right one is not there exactly once."""
    path = tree / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.right) != 1:
        raise ValueError(f"{mutation.file} has {mutation.right!r} {text.count(mutation.right)} times, not once")
    path.write_text(text.replace(mutation.right, mutation.wrong), encoding="utf-8")


def copied_tree(folder: Path) -> Path:
    """A copy of every file that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def noticed(mutation: Mutation, workers: int) -> tuple[str, float]:
    """The test that failed first ("" where none did), and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copied_tree(Path(folder))
        mutate(tree, mutation)
        environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": "1"}
        environment |= {"DS_ACCELERATOR": "cpu"}
        words = [
            "-q",
            "-x",
            "-n",
            str(workers),
            "--dist",
            "loadfile",
            "-m",
            "not gpu and not slurm and not hosts and not browser",
        ]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words, mutation.tests],
            env=environment,
            cwd=tree,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - started
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1, 2) or (done.returncode and not failed):
        sys.exit(f"{mutation.name}: pytest did not run (exit code {done.returncode}):\n{done.stdout[-2000:]}")
    return failed[0] if failed else "", seconds


def main() -> int:
    """Try the mutations that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(m.name for m in MUTATIONS)}")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {mutation.name for mutation in MUTATIONS}:
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in MUTATIONS if mutation.name in arguments.names or not arguments.names]
    survived = 0
    for mutation in (bar := tqdm(chosen, unit="mutation", dynamic_ncols=True)):
        test, seconds = noticed(mutation, arguments.workers)
        survived += not test
        bar.write(f"{mutation.name}: {f'noticed by {test}' if test else 'SURVIVED'} ({seconds:.0f} s)")
    return min(survived, 1)


if __name__ == "__main__":
    sys.exit(main())
