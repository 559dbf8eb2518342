"""Checkpoints of a real model on this machine's disk: what saving costs the steps it overlaps, bandwidths, resuming.

`python -m dla_train.bench checkpoint` writes checkpoint.json and checkpoint.md. Everything that is compared is measured
in turn in one process: a save beside plain steps of the same model, bytes of a checkpoint beside as many plain bytes on
the same disk, with the page cache dropped before every read that is called cold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dla_kernels.markdown import markdown_table
from dla_train.checkpoint.checkpointer import Checkpointer
from dla_train.checkpoint.manifest import CHUNK_BYTES
from dla_train.checkpoint.resuming import newest_undamaged
from dla_train.checkpoint.stored import StoredCheckpoint
from dla_train.config import Config
from dla_train.engine import Engine, build_engine
from dla_train.hydra_app import compose
from dla_train.models.build import meta_model
from dla_train.parallel.mesh import Mesh

RESULTS, PAGE = "checkpoint.json", "checkpoint.md"
TOKENS = 128
"""Of a measured step: short, because a 125M model on a CPU is slow, and a short step shows a disturbance best."""
PLAIN_STEPS = 6
DATA = {"tokens": 0}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dla_train.bench checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="gated_deltanet_125m", help="of configs/model (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement (default %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="where to write checkpoints (default: the system's temporary folder)"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder (default %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(options.model, Path(folder), options.rounds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / PAGE).write_text(page(results), encoding="utf-8")
    print(page(results))
    return 0


def measure(model: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Every measurement of `model`, with its checkpoints in `folder`."""
    config = compose(
        [
            f"model={model}",
            "memory=single",
            "name=bench",
            f"run_dir={folder}/run",
            "checkpoint.keep_last=1",
            "data=files",
        ]
        + ["data.name=none", "data.train=[none]", "data.tokenizer=none", f"data.context_tokens={TOKENS}"]
        + ["train.device=cpu", "train.steps=1000", "train.global_batch_rows=1", "train.micro_batch_rows=1"]
    )
    results: dict[str, Any] = {"environment": environment(model)}
    with Mesh.start(config) as mesh, Checkpointer(config, mesh) as checkpointer:
        bench = Bench(config, mesh, checkpointer)
        bench.step()  # makes the moments
        results["saving"] = bench.saving(rounds)
        results["overlap"] = bench.overlap(rounds)
        results["loading"] = bench.loading(rounds)
    results["starting"] = [start_seconds() for _ in range(rounds)]
    return results


class Bench:
    """A model with its moments, its checkpoints, and a clock."""

    def __init__(self, config: Config, mesh: Mesh, checkpointer: Checkpointer) -> None:
        self._config, self._mesh, self._checkpointer = config, mesh, checkpointer
        self._engine = self._build()
        self._done = 0

    def step(self) -> float:
        """One real step on random tokens; its seconds."""
        started = time.perf_counter()
        train_once(self._engine, self._config.model.vocab_size)
        self._done += 1
        return time.perf_counter() - started

    def saving(self, rounds: int) -> list[dict[str, float]]:
        """Saves that are waited for, each beside as many plain bytes written and flushed, and hashed alone."""
        records = []
        for _ in tqdm(range(rounds), desc="saving", leave=False):
            self._done += 1
            processor = time.process_time()
            with stopwatch() as copy:
                self._checkpointer.save(self._done, self._engine, DATA)
            with stopwatch() as rest:
                assert self._checkpointer.finish() is None
            processor = time.process_time() - processor
            size = self._newest().manifest.total_bytes
            plain = write_plain(self._checkpointer.root / "plain", size)
            hashing = hash_alone(size)
            records.append(
                {
                    "bytes": size,
                    "copy_seconds": copy[0],
                    "write_seconds": rest[0],
                    "processor_seconds": processor,
                    "disk_seconds": plain,
                    "hash_seconds": hashing,
                }
            )
        return records

    def overlap(self, rounds: int) -> list[dict[str, Any]]:
        """Plain steps, then a save and the steps that pass until it is complete."""
        records = []
        self.step()
        for _ in tqdm(range(rounds), desc="overlap", leave=False):
            plain = [self.step() for _ in range(PLAIN_STEPS)]
            with stopwatch() as copy:
                self._checkpointer.save(self._done, self._engine, DATA)
            step = self._done
            disturbed = []
            while self._checkpointer.last_complete != step:
                disturbed.append(self.step())
            assert self._checkpointer.finish() is None
            records.append({"copy_seconds": copy[0], "plain_seconds": plain, "disturbed_seconds": disturbed})
        return records

    def loading(self, rounds: int) -> list[dict[str, float]]:
        """Resuming by part, cold and warm, beside a plain cold read of the same files."""
        records = []
        for _ in tqdm(range(rounds), desc="loading", leave=False):
            record: dict[str, float] = {"bytes": self._newest().manifest.total_bytes}
            self._forget()
            with stopwatch() as clock:
                self._read_plainly()
            record["disk_seconds"] = clock[0]
            with stopwatch() as clock:
                engine = self._build()
            record["build_seconds"] = clock[0]
            for temperature in ("cold", "warm"):
                if temperature == "cold":
                    self._forget()
                with stopwatch() as clock:
                    opened = newest_undamaged(self._checkpointer.root, engine.shapes(), self._mesh)
                assert opened is not None
                record[f"{temperature}_check_seconds"] = clock[0]
                with stopwatch() as clock:
                    engine.import_state(opened.tensors, opened.step)
                record[f"{temperature}_load_seconds"] = clock[0]
                del opened  # what is mapped cannot be dropped from the page cache
            with stopwatch() as clock:
                train_once(engine, self._config.model.vocab_size)
            record["first_step_seconds"] = clock[0]
            records.append(record)
        return records

    def _build(self) -> Engine:
        return build_engine(self._config, meta_model(self._config, self._mesh.axes), self._mesh)

    def _newest(self) -> StoredCheckpoint:
        return StoredCheckpoint(max(self._checkpointer.root.glob("step_*")))

    def _files(self) -> list[Path]:
        checkpoint = self._newest()
        return [checkpoint.folder / name for name in checkpoint.manifest.files]

    def _forget(self) -> None:
        """Drop the files from the page cache."""
        for path in self._files():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _read_plainly(self) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for path in self._files():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def train_once(engine: Engine, vocab_size: int) -> None:
    """Forward, backward and update on one row of random tokens."""
    model = engine.module
    tokens = torch.randint(vocab_size, (1, TOKENS))
    edges = torch.tensor([0, TOKENS], dtype=torch.int32)
    nats, _, _ = model.token_loss(model(tokens, edges).logits, tokens, 0.0)
    engine.backward(nats / TOKENS, last=True)
    engine.step(1e-4)


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """A list that holds the seconds of the block once it is left."""
    seconds: list[float] = []
    started = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - started)


def write_plain(path: Path, size: int) -> float:
    """Seconds to write and flush `size` bytes of one file, which is then deleted."""
    chunk = os.urandom(CHUNK_BYTES)
    with stopwatch() as clock, open(path, "wb", buffering=0) as file:
        for _ in range(size // CHUNK_BYTES):
            file.write(chunk)
        os.fsync(file.fileno())
    path.unlink()
    return clock[0] * size / (size // CHUNK_BYTES * CHUNK_BYTES)


def hash_alone(size: int) -> float:
    """Seconds to hash `size` bytes that lie in memory."""
    chunk, digest, part = os.urandom(CHUNK_BYTES), hashlib.sha256(), min(size, 2**28)
    with stopwatch() as clock:
        for _ in range(part // CHUNK_BYTES):
            digest.update(chunk)
    return clock[0] * size / part


def start_seconds() -> float:
    """Seconds until a new process has imported the trainer."""
    with stopwatch() as clock:
        subprocess.run([sys.executable, "-c", "import dla_train.train"], check=True)
    return clock[0]


def environment(model: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "model": model,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    env, saving, loading = results["environment"], results["saving"], results["loading"]
    beside = f"a checkpoint written while {env['threads']} of {env['cores']} cores train on rows of {TOKENS} tokens"
    bandwidth = ["bandwidth, GB/s", "checkpoint", "plain file, same disk", "ratio"]
    start = ["from the command to the first step, seconds", "cold", "warm"]
    sections = [
        "# Checkpoints",
        "Made by `python -m dla_train.bench checkpoint`; numbers in checkpoint.json. Medians over rounds measured in "
        f"turn, least and most in brackets. {env['model']} with AdamW's moments, {saving[0]['bytes'] / 1e9:.2f} GB, "
        f"one process, {env['cores']} cores with {env['load_before']:.1f} other processes at work before; torch "
        f"{env['torch']}, Python {env['python']}.",
        markdown_table([beside, ""], _overlap(results["overlap"], saving)),
        markdown_table(bandwidth, _bandwidth(saving, loading)),
        markdown_table(start, _start(results["starting"], loading)),
    ]
    return "\n\n".join(sections) + "\n"


def _overlap(overlap: list[dict[str, Any]], saving: list[dict[str, Any]]) -> list[list[str]]:
    """What saving takes from training."""
    plain = [statistics.median(r["plain_seconds"]) for r in overlap]
    pairs = list(zip(overlap, plain, strict=True))
    ratios = [statistics.mean(r["disturbed_seconds"]) / p for r, p in pairs]
    lost = [r["copy_seconds"] + sum(r["disturbed_seconds"]) - p * len(r["disturbed_seconds"]) for r, p in pairs]
    whole = [r["copy_seconds"] + r["write_seconds"] for r in saving]
    return [
        ["steps that overlap it", _spread([float(len(r["disturbed_seconds"])) for r in overlap])],
        ["their time against plain steps'", _spread(ratios)],
        ["standstill for the copy", f"{_spread([r['copy_seconds'] for r in overlap])} s"],
        ["training time lost in all, copy included", f"{_spread(lost)} s"],
        ["processor time of a save", f"{_spread([r['processor_seconds'] for r in saving])} s"],
        ["a save that is waited for", f"{_spread(whole)} s"],
    ]


def _bandwidth(saving: list[dict[str, Any]], loading: list[dict[str, Any]]) -> list[list[str]]:
    """Speed of the checkpoint, of a plain file on the same disk, and of the one against the other."""
    rows = []
    for name, records, key in (
        ("written, hashed and flushed", saving, "write_seconds"),
        ("checked cold (read and hashed)", loading, "cold_check_seconds"),
    ):
        here = [r["bytes"] / r[key] / 1e9 for r in records]
        plain = [r["bytes"] / r["disk_seconds"] / 1e9 for r in records]
        ratios = [a / b for a, b in zip(here, plain, strict=True)]
        rows.append([name, _spread(here), _spread(plain), _spread(ratios)])
    hashed = _spread([r["bytes"] / r["hash_seconds"] / 1e9 for r in saving])
    return [*rows, ["sha256 alone, one thread, from memory", hashed, "", ""]]


def _start(starting: list[float], loading: list[dict[str, Any]]) -> list[list[str]]:
    """Seconds of each part of a start, with files off and in the page cache."""

    def of(key: str) -> str:
        return _spread([r[key] for r in loading])

    return [
        ["Python and imports", _spread(starting), ""],
        ["model and optimizer", of("build_seconds"), ""],
        ["checking every byte", of("cold_check_seconds"), of("warm_check_seconds")],
        ["loading", of("cold_load_seconds"), of("warm_load_seconds")],
        ["first step", of("first_step_seconds"), ""],
    ]


def _spread(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"
