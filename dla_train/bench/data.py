"""Speed of reading training data, and what a start on a corpus of 50 billion tokens costs: docs/results/data.json, .md.

Reading is timed in turn with megatron-core's GPTDataset on the same files, one thread each, files in the page cache.
The large corpus is an index of real size beside a `.bin` that is a hole (no disk is filled); each start is a process of
its own, whose peak memory is its own. Megatron's index goes into an empty cache, as at a first start.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dla_kernels.markdown import markdown_table
from dla_train.bench.cpu import environment, measure_in_turn
from dla_train.config import DataConfig
from dla_train.data.index_file import HEADER
from dla_train.data.indexed import TokenFiles
from dla_train.data.loader import BatchSource, training_batches
from dla_train.data.token_file import token_file_paths
from dla_train.hydra_app import compose
from dla_train.metrics import PEAK_TFLOPS
from dla_train.models.cost import flops_per_token

RESULTS = "data.json"
BATCH_TOKENS = 1 << 17
"""Tokens of a batch that is read: 32 rows of 4K, 8 of 16K."""
BATCHES = 16
"""Batches read in a round."""
CONTEXTS = (4096, 16384)
PACKINGS = ("concatenate", "best_fit")
FASTEST = "experiment=ladder_125m_gated_deltanet_single"
"""The training run that takes the fewest FLOPs a token."""
_MEDIAN_TOKENS, _SPREAD = 750, 1.4  # document lengths: log-normal, mean 2000


class _Rows(Protocol):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...

    def __len__(self) -> int: ...


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results; `--start` is what the measuring processes are."""
    parser = argparse.ArgumentParser(prog="python -m dla_train.bench data", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default %(default)s)")
    parser.add_argument("--documents", type=float, default=25e6, help="documents of the large corpus (default 25e6)")
    parser.add_argument("--starts", type=int, default=3, help="starts of each kind (default %(default)s)")
    parser.add_argument("--start", nargs=3, help=argparse.SUPPRESS)  # prefix, what, context
    options = parser.parse_args(arguments)
    if options.start:
        prefix, what, context = options.start
        print(json.dumps(start(prefix, what, int(context))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "environment": environment() | {"numpy": np.__version__},
            "demand": demand(),
            "reading": reading(Path(folder), options.rounds, tokens=int(min(64e6, options.documents * 20))),
            "starts": starts(Path(folder), int(options.documents), options.starts),
        }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output / "data.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    return 0


def demand() -> dict[str, Any]:
    """Tokens a second that one device could train of the fastest experiment if it did nothing but its FLOPs."""
    config = compose([FASTEST])
    flops = flops_per_token(config.model, config.memory, config.data.context_tokens).training
    peak = max(PEAK_TFLOPS.values())
    return {"experiment": FASTEST, "peak_tflops": peak, "tokens_per_second": peak * 1e12 / flops}


def reading(folder: Path, rounds: int, tokens: int) -> dict[str, Any]:
    """Tokens a second of this loader's forms and megatron's, in turn."""
    prefix = str(folder / "small")
    total = write_corpus(prefix, max(tokens // 2000, 100), filled=True)
    results: dict[str, Any] = {"tokens_in_files": total, "batch_tokens": BATCH_TOKENS}
    for context in CONTEXTS:
        things: dict[str, Callable[[], float]] = {
            packing: functools.partial(_read_ours, _batches(prefix, packing, context), iter(range(10**9)))
            for packing in PACKINGS
        }
        dataset = megatron_dataset(prefix, context, total // context - 1, folder / f"cache{context}")
        things["megatron"] = functools.partial(_read_megatron, dataset, BATCH_TOKENS // context, iter(range(10**9)))
        timings = measure_in_turn(things, rounds)
        speeds = {name: sorted(BATCH_TOKENS / seconds for seconds in timing.rounds) for name, timing in timings.items()}
        results[str(context)] = {
            name: {"median": float(np.median(values)), "least": values[0], "most": values[-1]}
            for name, values in speeds.items()
        }
    return results


def starts(folder: Path, documents: int, repeats: int) -> list[dict[str, Any]]:
    """Starts on the large corpus, kinds in turn, a process for each; seconds by start, memory of the largest."""
    prefix = str(folder / "large")
    tokens = write_corpus(prefix, documents, filled=False)
    found: list[dict[str, Any]] = []
    for context in CONTEXTS:
        for what in (*PACKINGS, "megatron"):
            found.append({"what": what, "context": context, "documents": documents, "tokens": tokens, "seconds": []})
    for _ in range(repeats):
        for record in found:
            arguments = [prefix, record["what"], str(record["context"])]
            command = [sys.executable, "-m", "dla_train.bench.data", "--start", *arguments]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            numbers = json.loads(done.stdout.splitlines()[-1])
            record["seconds"].append(numbers["seconds"])
            for name in ("peak_bytes", "imported_bytes"):
                record[name] = max(record.get(name, 0), numbers[name])
    return found


def start(prefix: str, what: str, context: int) -> dict[str, float]:
    """Open a corpus as a run does and read the first rows of a rank; seconds after imports, and peak memory."""
    if what == "megatron":
        _megatron()
        imported = _peak_bytes()
        rows = Path(f"{prefix}.bin").stat().st_size // 2 // context - 1
        with tempfile.TemporaryDirectory() as cache:
            began = time.perf_counter()
            megatron_dataset(prefix, context, rows, Path(cache))[0]
            return {"seconds": time.perf_counter() - began, "peak_bytes": _peak_bytes(), "imported_bytes": imported}
    imported, began = _peak_bytes(), time.perf_counter()
    batches = _batches(prefix, what, context)
    batches.batch(0, 0, batches.global_batch_rows, 1)
    assert batches.state(1)  # with the fingerprint of the files
    return {"seconds": time.perf_counter() - began, "peak_bytes": _peak_bytes(), "imported_bytes": imported}


def write_corpus(prefix: str, documents: int, *, filled: bool) -> int:
    """Write token files of log-normal documents; returns their tokens. Not `filled`: the `.bin` is a hole."""
    bin_path, idx_path, _ = token_file_paths(prefix)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(_MEDIAN_TOKENS), _SPREAD, documents), 1, 5e6).astype("<i4")
    ends = np.cumsum(lengths, dtype="<i8")
    with idx_path.open("wb") as stream:
        stream.write(HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1))
        for part in (lengths, (ends - lengths) * 2, np.arange(documents + 1, dtype="<i8")):
            part.tofile(stream)
    with bin_path.open("wb") as stream:
        if filled:
            rng.integers(0, 32000, int(ends[-1]), dtype="<u2").tofile(stream)
        stream.truncate(int(ends[-1]) * 2)
    return int(ends[-1])


def megatron_dataset(prefix: str, context: int, rows: int, cache: Path) -> _Rows:
    """megatron-core's GPTDataset over the whole corpus."""
    gpt, builder = _megatron()

    class Tokenizer:
        eod, pad, vocab_size, unique_identifiers = 0, 1, 32000, {"tokenizer": "none"}

    config = gpt.GPTDatasetConfig(
        random_seed=0,
        sequence_length=context,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    make = builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, [rows, 0, 0], lambda: True, config)
    dataset: _Rows = make.build()[0]
    return dataset


def _megatron() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import blended_megatron_dataset_builder, gpt_dataset
    return gpt_dataset, blended_megatron_dataset_builder


def _batches(prefix: str, packing: str, context: int) -> BatchSource:
    data = DataConfig("bench", [prefix], packing=packing, tokenizer="none", context_tokens=context)
    files = {"train": TokenFiles([prefix], vocab_size=32000)}
    return training_batches(data, files, global_batch_rows=BATCH_TOKENS // context, seed=0)


def _read_ours(batches: BatchSource, steps: Any) -> float:
    began = time.perf_counter()
    for _ in range(BATCHES):
        batches.batch(next(steps), 0, 1, batches.global_batch_rows)
    return (time.perf_counter() - began) / BATCHES


def _read_megatron(dataset: _Rows, count: int, steps: Any) -> float:
    began = time.perf_counter()
    for _ in range(BATCHES):
        first = next(steps) * count
        rows = [dataset[(first + row) % len(dataset)] for row in range(count)]
        for part in ("tokens", "labels"):
            torch.stack([row[part] for row in rows])
    return (time.perf_counter() - began) / BATCHES


def _peak_bytes() -> int:
    """Peak resident memory of this process alone: getrusage would count the process that started it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; peak memory is measured on Linux only")


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    env, wanted, first = results["environment"], results["demand"], results["starts"][0]
    read = ["T", "reader", "M tokens/s (least to most)", "times megatron", "times the demand"]
    started = ["T", "what", "seconds (least to most)", "peak MiB", "of it imports"]
    sections = [
        "# Speed of reading data",
        "Made by `python -m dla_train.bench data`; numbers in data.json.",
        f"One thread, numpy {env['numpy']}, torch {env['torch']}, Python {env['python']}. Batches of {BATCH_TOKENS} "
        "tokens, files in the page cache, timed in turn. The demand is what the fastest experiment "
        f"({wanted['experiment'].partition('=')[2]}) could take at most, {wanted['tokens_per_second'] / 1e6:.2f}M "
        f"tokens/s, on a device of {wanted['peak_tflops']:.0f} TFLOP/s that did nothing but its FLOPs.",
        markdown_table(read, _reading_rows(results["reading"], wanted["tokens_per_second"])),
        f"A start on {first['tokens'] / 1e9:.1f}B tokens in {first['documents'] / 1e6:.1f}M documents, up to the first "
        "rows of a rank, after imports; peak memory of the process, imports included.",
        markdown_table(started, map(_start_row, results["starts"])),
    ]
    return "\n\n".join(sections) + "\n"


def _reading_rows(found: dict[str, Any], wanted: float) -> Iterator[list[str]]:
    """A row for every context and reader; wanted: tokens a second."""
    for context in CONTEXTS:
        speeds = found.get(str(context), {})
        for name, speed in speeds.items():
            ratio = speed["median"] / speeds["megatron"]["median"]
            spread = f"{speed['median'] / 1e6:.1f} ({speed['least'] / 1e6:.1f} to {speed['most'] / 1e6:.1f})"
            yield [str(context), name, spread, f"{ratio:.1f}", f"{speed['median'] / wanted:.0f}"]


def _start_row(r: dict[str, Any]) -> list[str]:
    seconds = r["seconds"]
    return [
        str(r["context"]),
        r["what"],
        f"{np.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
        f"{r['peak_bytes'] / 2**20:.0f}",
        f"{r['imported_bytes'] / 2**20:.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
