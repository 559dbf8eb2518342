"""Where the time of four ranks on this machine's CPU goes, layout by layout: what the trainer adds to the model's work.

Four processes share the processor's cores, so that these are no speeds: the share of a step outside forward, backward,
communication and optimizer step is what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_prep.stdlib_files import prepare_stdlib_files
from dla_kernels.markdown import markdown_table
from dla_train.hydra_app import compose
from dla_train.trackers import METRICS_FILE, read_lines

RANKS = 4
LAYOUTS: dict[str, tuple[str, ...]] = {
    "data 4": (),
    "tensor 2, data 2": ("parallel.tensor=2",),
    "tensor 2 with sequence, context 2": ("parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"),
    "ZeRO 1, data 4": ("engine=deepspeed", "engine.zero_stage=1"),
    "ZeRO 3, tensor 2, data 2": ("engine=deepspeed", "engine.zero_stage=3", "parallel.tensor=2"),
}
WARM_UP = 2
"""Steps at the start that are not counted."""


def layout_overheads(steps: int) -> dict[str, Any]:
    """The share of each layout, over `steps` steps of the quickstart's run. Target: under 5%."""
    quickstart = compose(["experiment=quickstart"])
    prepare_stdlib_files(quickstart.data.tokenizer, quickstart.model.vocab_size)
    return {name: _overhead(keys, steps) for name, keys in tqdm(LAYOUTS.items(), desc="layouts", leave=False)}


def _overhead(overrides: tuple[str, ...], steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "experiment=quickstart",
            f"run_dir={folder}/run",
            f"train.stop_at_step={steps + WARM_UP}",
            "train.micro_batch_rows=2",
            "train.validation_interval_steps=0",
            "checkpoint.interval_steps=0",
            "logging.interval_steps=1",
            "logging.progress=false",
            "train.device=cpu",
            *overrides,
        ]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", "-m", "dla_train.train"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        subprocess.run([sys.executable, *launcher, *arguments], check=True, env=environment)
        lines = [line for line in read_lines(Path(folder, "run", METRICS_FILE)) if "overhead" in line][WARM_UP:]
    shares = [line["overhead"] for line in lines]
    return {
        "median": statistics.median(shares),
        "least": min(shares),
        "most": max(shares),
        "steps": len(shares),
        "seconds": statistics.median(line["seconds"] for line in lines),
        "exchange": statistics.median(line["seconds_exchange"] / line["seconds"] for line in lines),
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    env = results["environment"]
    rows = [
        [name, f"{r['median']:.1%} ({r['least']:.1%} to {r['most']:.1%})", f"{r['exchange']:.1%}", "5%"]
        for name, r in results["layouts"].items()
    ]
    lines = [
        "# What the trainer adds on several ranks",
        "",
        f"Made by `python -m dla_train.bench layouts`: the quickstart's run on {RANKS} ranks of one machine's CPU,",
        f"torch {env['torch']}, Python {env['python']}. *Outside* is the share of a step that is neither forward,",
        "backward, communication nor optimizer step; *exchange* what ranks wait for one another to count targets and",
        "to decide. Medians over steps, least and most in brackets.",
        "",
        markdown_table(["layout", "outside", "exchange", "target of outside"], rows),
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measure and write layout_overheads.json and .md."""
    parser = argparse.ArgumentParser(prog="python -m dla_train.bench layouts", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps timed of each layout (default %(default)s)")
    options = parser.parse_args(arguments)
    environment = {"torch": torch.__version__, "python": platform.python_version(), "ranks": RANKS}
    results = {"environment": environment, "layouts": layout_overheads(options.steps)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "layout_overheads.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "layout_overheads.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    return 0
