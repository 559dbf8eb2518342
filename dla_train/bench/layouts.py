"""Where the time of four ranks on this machine's CPU goes, layout by layout: what the trainer adds to the model's work.

Four processes share the processor's cores, so that these are no speeds: the share of a step outside forward, backward,
communication and optimizer step is what is measured.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.stdlib_files import prepare_stdlib_files
from dla_train.hydra_app import compose
from dla_train.metrics import read_lines

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
        lines = [line for line in read_lines(Path(folder, "run", "metrics.jsonl")) if "overhead" in line][WARM_UP:]
    shares = [line["overhead"] for line in lines]
    return {
        "median": statistics.median(shares),
        "least": min(shares),
        "most": max(shares),
        "steps": len(shares),
        "seconds": statistics.median(line["seconds"] for line in lines),
        "exchange": statistics.median(line["seconds_exchange"] / line["seconds"] for line in lines),
    }
