"""Starting runs from tests, in other processes and under torchrun, and reading what they left."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dla_train.checkpoint.stored import open_step

ROOT = Path(__file__).parents[2]

TINY = (
    "name=tiny",
    "model.name=tiny",
    "model.vocab_size=320",
    "model.width=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_key_heads=2",
    "model.key_dim=8",
    "model.value_dim=8",
    "model.mlp_width=48",
    "data.context_tokens=32",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "train.steps=8",
    "train.global_batch_rows=8",
    "train.micro_batch_rows=4",
    "logging.interval_steps=1",
    "logging.progress=false",
)
"""A Gated DeltaNet with dynamic memory that trains for 8 steps in half a second; two epochs of the test corpus."""


def run_python(arguments: Sequence[str], timeout: float = 150, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run this interpreter on `arguments` with the packages of this source tree."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, env=environment, cwd=cwd
    )


def run_training(spec: Path, runs: Sequence[Sequence[str]], ranks: int | None = None) -> None:
    """Do several runs (lists of overrides), one after the other, in one process per rank; None is without torchrun."""
    spec.write_text(json.dumps([list(overrides) for overrides in runs]))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    done = run_python([*launcher, str(ROOT / "tests/train/worker.py"), str(spec)], timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def numbers_of(run_dir: str | Path, *names: str) -> list[tuple[float, ...]]:
    """(step, the named numbers ...) of every line of a run's metrics.jsonl that has them all."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], *(line[name] for name in names)) for line in lines if all(name in line for name in names)]


def tensors_of(run_dir: str | Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return dict(open_step(run_dir, step)[0].tensors("model", "optim", "rng"))


def write_corpus(folder: Path) -> list[str]:
    """Prepare a small corpus of under 8 steps an epoch; the overrides that name it, its held-out part and tokenizer."""
    from data_prep.sources import text_sources
    from data_prep.train_tokenizer import train_tokenizer
    from data_prep.write_tokens import TokenOptions, write_tokens

    folder.mkdir(parents=True, exist_ok=True)
    for index in range(60):
        lines = range(1, 4 + index % 5)
        words = " ".join(f"line {index * line % 13} adds {line * line % 17} to {index}" for line in lines)
        (folder / f"{index:02}.txt").write_text(f"{words}. Gr\u00fc\u00dfe {index}\n", encoding="utf-8")
    sources = text_sources(sorted(folder.glob("*.txt")))
    tokenizer = train_tokenizer(sources, folder / "tiny.model", 310, progress=False).path
    part = text_sources(sorted(folder.glob("*.txt"))[:36])
    options = TokenOptions(validation_fraction=0.2)
    write_tokens(part, folder / "tiny", tokenizer, options, progress=False)
    return [
        f"data.train=[{folder}/tiny_train]",
        f"data.validation=[{folder}/tiny_validation]",
        f"data.tokenizer={tokenizer}",
    ]
