"""Speed of preparing text: how tokenising scales over processes, and how many of them one reader can feed.

The corpus is Python's standard library, repeated with a number before each document. In every round three things are
timed in turn, each with the start of its processes: one process, several, and as many preparations of one process at
once, each of its part of the corpus. The last is all that the machine could give at that time, which on one that others
use is less than its cores. This module imports little, for the processes it starts import it too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources import text_sources
from data_prep.stdlib_corpus import write_stdlib_corpus
from data_prep.train_tokenizer import train_tokenizer
from data_prep.write_tokens import TokenOptions, write_tokens

RESULTS = "prepare.json"
VOCAB_SIZE = 32000
DUPLICATES = ("keep", "exact", "near")


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results; `--once` is what the measuring processes are."""
    parser = argparse.ArgumentParser(prog="python -m dla_train.bench prepare", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="compare one process with this many (default 2)")
    parser.add_argument("--megabytes", type=float, default=30.0, help="text of a run (default %(default)s)")
    parser.add_argument("--once", nargs=4, help=argparse.SUPPRESS)  # folder, corpus, workers, duplicates
    options = parser.parse_args(arguments)
    if options.once:
        folder, corpus, workers, duplicates = options.once
        print(json.dumps(once(Path(folder), corpus, int(workers), duplicates)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name), int(options.megabytes * 1e6), options.workers)
        runs = measure(Path(name), options.rounds, options.workers)
    cores = {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
    results = {"environment": cores, **runs}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output / "prepare.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    return 0


def write_corpus(folder: Path, size: int, parts: int) -> None:
    """`whole.jsonl` of about `size` bytes, every document another; its `part` files; and a tokenizer for it."""
    write_stdlib_corpus(folder / "stdlib.jsonl", progress=False)
    records = [json.loads(line) for line in (folder / "stdlib.jsonl").read_text(encoding="utf-8").splitlines()]
    lines: list[str] = []
    written = 0
    while written < size:
        record = records[len(lines) % len(records)]
        lines.append(json.dumps({"text": f"{len(lines)} {record['text']}"}, ensure_ascii=False) + "\n")
        written += len(lines[-1])
    (folder / "whole.jsonl").write_text("".join(lines), encoding="utf-8")
    for part in range(parts):
        (folder / f"part{part}.jsonl").write_text("".join(lines[part::parts]), encoding="utf-8")
    train_tokenizer(text_sources([folder / "stdlib.jsonl"]), folder / "bench.model", VOCAB_SIZE, progress=False)


def measure(folder: Path, rounds: int, workers: int) -> dict[str, Any]:
    """The three things in turn, after one round that warms the files; then the kinds of duplicates."""
    scaling: list[dict[str, Any]] = []
    for number in range(rounds + 1):
        found = {
            "one": _run(folder, ["whole"], 1, "keep"),
            "several": _run(folder, ["whole"], workers, "keep"),
            "apart": _run(folder, [f"part{part}" for part in range(workers)], 1, "keep"),
        }
        scaling += [found] if number else []
    duplicates = [_run(folder, ["whole"], workers, kind) for kind in DUPLICATES]
    return {"workers": workers, "scaling": scaling, "duplicates": duplicates}


def _run(folder: Path, corpora: list[str], workers: int, duplicates: str) -> dict[str, Any]:
    """Preparations of `corpora` at once: seconds until all have ended; the rest summed over them."""
    command = [sys.executable, "-m", "dla_train.bench.prepare", "--once", str(folder)]
    began = time.perf_counter()
    running = [
        subprocess.Popen([*command, corpus, str(workers), duplicates], stdout=subprocess.PIPE, text=True)
        for corpus in corpora
    ]
    printed = [process.communicate()[0] for process in running]
    seconds = time.perf_counter() - began
    if any(process.returncode for process in running):
        raise RuntimeError(f"a preparation of {', '.join(corpora)} failed; its reason is above")
    found = [json.loads(text.splitlines()[-1]) for text in printed]
    summed = {name: sum(one[name] for one in found) for name in found[0]}
    return {"duplicates": duplicates, "seconds": seconds, **summed}


def once(folder: Path, corpus: str, workers: int, duplicates: str) -> dict[str, float]:
    """One preparation in this process: what it read, and processor seconds of the reader and of what it started."""
    options = TokenOptions(duplicates=duplicates, shard_tokens=5_000_000)
    sources, output, model = (
        text_sources([folder / f"{corpus}.jsonl"]),
        folder / f"out_{corpus}",
        folder / "bench.model",
    )
    report = write_tokens(sources, output, model, options, workers=workers, overwrite=True, progress=False)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    split = report.splits["all"]
    return {
        "tokens": split.tokens,
        "text_bytes": split.text_bytes,
        "documents": split.documents,
        "reader_cpu_seconds": time.process_time(),
        "worker_cpu_seconds": children.ru_utime + children.ru_stime,
    }


def ratios(results: dict[str, Any], above: str, below: str) -> list[float]:
    """Of every round: seconds of one thing by seconds of another, in order of size."""
    return sorted(found[above]["seconds"] / found[below]["seconds"] for found in results["scaling"])


def overhead(results: dict[str, Any]) -> float:
    """Processor time of several processes by that of one, starts included."""
    total = {name: [_processor_seconds(found[name]) for found in results["scaling"]] for name in ("one", "several")}
    return float(np.median(total["several"]) / np.median(total["one"]))


def _processor_seconds(run: dict[str, Any]) -> float:
    return float(run["reader_cpu_seconds"] + run["worker_cpu_seconds"])


def reader_feeds(results: dict[str, Any]) -> float:
    """Tokenising processes that one reader keeps busy: their processor time by the reader's, starts included."""
    runs = [found["several"] for found in results["scaling"]]
    return float(np.median([run["worker_cpu_seconds"] / run["reader_cpu_seconds"] for run in runs]))


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    from dla_kernels.markdown import markdown_table  # imports torch: not in the processes that are timed

    env, workers, first = results["environment"], results["workers"], results["scaling"][0]["one"]
    processor = "processor seconds a GB of text: reader, tokenising"
    kinds = [[run["duplicates"], _processor([run], together=False)] for run in results["duplicates"]]
    sections = [
        "# Speed of preparing text",
        "Made by `python -m dla_train.bench prepare`; numbers in prepare.json.",
        f"{env['cores']} cores that others use too, Python {env['python']}, numpy {env['numpy']}. A sentencepiece "
        f"model of {VOCAB_SIZE} ids, {first['documents']} documents, {first['text_bytes'] / 1e6:.0f} MB of text, "
        f"{first['tokens'] / 1e6:.1f}M tokens, shards of 5M tokens; the start of every process is in the times.",
        markdown_table(["", "M tokens/s, median (least to most)", processor], _scaling_rows(results)),
        f"Rounds timed in turn, {len(results['scaling'])}: {workers} processes are "
        f"{_spread(ratios(results, 'one', 'several'))} times as fast as one, and "
        f"{_spread(ratios(results, 'apart', 'several'))} times as fast as {workers} preparations at once, "
        "which is all that the machine could give at that time.\n"
        f"They take {overhead(results):.2f} times the processor time of one: with {workers} cores to themselves "
        f"{workers / overhead(results):.2f} times as fast.\n"
        f"By processor time one reader feeds {reader_feeds(results):.0f} tokenising processes: an estimate, for "
        f"more than {workers} were not run.",
        markdown_table([f"duplicates, {workers} processes, one run each", processor], kinds),
    ]
    return "\n\n".join(sections) + "\n"


def _scaling_rows(results: dict[str, Any]) -> Iterator[list[str]]:
    workers = results["workers"]
    names = {
        "one": "1 process",
        "several": f"{workers} processes",
        "apart": f"{workers} preparations at once, of parts",
    }
    for name, label in names.items():
        runs = [found[name] for found in results["scaling"]]
        speeds = [run["tokens"] / run["seconds"] / 1e6 for run in runs]
        yield [label, _spread(speeds), _processor(runs, together=name != "several")]


def _spread(values: list[float]) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _processor(runs: list[dict[str, Any]], *, together: bool) -> str:
    reader, tokenising = (
        float(np.median([run[name] / run["text_bytes"] * 1e9 for run in runs]))
        for name in ("reader_cpu_seconds", "worker_cpu_seconds")
    )
    return f"{reader + tokenising:.0f} together" if together else f"{reader:.0f}, {tokenising:.0f}"


if __name__ == "__main__":
    sys.exit(main())
