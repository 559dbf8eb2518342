"""How busy a sweep of twenty tiny runs keeps the cores of this machine.

The sweep is `dla-sweep` as a user starts it, over the quickstart's data. What counts is the processor time of the
points from the first start to the last end, over wall time and cores, as dla-sweep writes it into use.json. The
kernel's own count of the whole machine is taken beside it: idle cores are the sweep's loss, cores that other programs
had are not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep.stdlib_files import prepare_stdlib_files
from dla_kernels.markdown import markdown_table
from dla_train.hydra_app import compose

RESULTS = "sweep_utilisation"
TARGET = 0.85
"""Share of the cores' time that the points are to take."""
QUIET = 0.05
"""Share of the cores that others, dla-sweep itself included, may have had for the target to be judged."""
SWEEP = (
    "sweep=tau_capacity",
    "sweep.axes.memory.capacity=[4,8]",
    "experiment=quickstart",
    "model.width=64",
    "model.num_layers=2",
    "data.context_tokens=32",
    "train.device=cpu",
    "train.validation_interval_steps=0",
    "train.validation_batches=1",
    "checkpoint.interval_steps=0",
)
"""Four thresholds by two capacities and two baselines, with two seeds each: twenty points."""
KERNEL_COUNTS = Path("/proc/stat")


def main(arguments: Sequence[str]) -> int:
    """Measure and write sweep_utilisation.json and .md."""
    parser = argparse.ArgumentParser(prog="python -m dla_train.bench sweep", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder (default %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="training steps of a point (default %(default)s)")
    parser.add_argument("--keep", type=Path, help="new folder for the sweep and its report (default: it is deleted)")
    options = parser.parse_args(arguments)
    if options.keep and options.keep.exists():
        parser.error(f"--keep={options.keep} exists; name a new folder")
    quickstart = compose(["experiment=quickstart"])
    prepare_stdlib_files(quickstart.data.tokenizer, quickstart.model.vocab_size)
    results = measure([*SWEEP, f"train.steps={options.steps}", "optim.warmup_steps=2"], options.keep)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{RESULTS}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / f"{RESULTS}.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    return 0


def measure(words: Sequence[str], keep: Path | None = None) -> dict[str, Any]:
    """Run `dla-sweep words` in a new folder, copied to `keep`. Raises CalledProcessError where it or a point fails."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    environment.pop("OMP_NUM_THREADS", None)  # points have their share of the cores
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sweep"
        command = [sys.executable, "-m", "dla_train.sweep.command", *words, f"sweep.folder={folder}"]
        began, process = time.monotonic(), subprocess.Popen(command, env=environment)
        counts = []
        while process.poll() is None:
            counts.append((time.time(), *machine_counts()))
            time.sleep(0.2)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        seconds = time.monotonic() - began
        first = min(path.stat().st_mtime for path in folder.glob("points/*/start.json"))
        last = max(path.stat().st_mtime for path in folder.glob("points/*/outcome.json"))
        use = json.loads((folder / "use.json").read_text(encoding="utf-8"))
        points = len(list(folder.glob("points/*/outcome.json")))
        if keep:
            shutil.copytree(folder, keep)
    facts = {"torch": torch.__version__, "python": platform.python_version(), "cores": use["cores"]}
    within = [count for count in counts if first <= count[0] <= last]
    idle = idle_share(within[0][1:], within[-1][1:])
    shares = {"idle": idle, "others": max(0.0, 1 - idle - use["cores_busy"])}
    return {"environment": facts, "points": points, "command_seconds": seconds, "use": use | shares}


def machine_counts() -> tuple[int, int]:
    """(idle, all) ticks of all cores of this machine since it was started; waiting for a disk is idle."""
    ticks = [int(word) for word in KERNEL_COUNTS.read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def idle_share(before: tuple[int, ...], after: tuple[int, ...]) -> float:
    """Idle share between two counts."""
    return (after[0] - before[0]) / max(1, after[1] - before[1])


def verdict(use: dict[str, Any]) -> str:
    """Whether the target is reached; it cannot be said where other programs had part of the machine."""
    if use["cores_busy"] >= TARGET:
        return "reached"
    return "**missed**" if use["others"] <= QUIET else "not to be judged: other programs were at work"


def table(results: dict[str, Any]) -> str:
    """The page."""
    env, use = results["environment"], results["use"]
    shares = {
        f"cores' time that points took (target {TARGET:.0%}: {verdict(use)})": use["cores_busy"],
        "cores' time that nobody took": use["idle"],
        "cores' time of all others: dla-sweep itself, the system, other programs": use["others"],
        "places taken": use["places_taken"],
    }
    lines = [
        "# How busy a sweep keeps a machine",
        "",
        f"Made by `python -m dla_train.bench sweep`: {results['points']} points of tiny runs, {use['places']} at a "
        f"time, on {env['cores']} cores; torch {env['torch']}, Python {env['python']}.",
        "From the first start to the last end:",
        "",
        markdown_table(["", "share"], [[what, f"{share:.1%}"] for what, share in shares.items()]),
        "",
        f"That was {use['seconds']:.0f} s of the {results['command_seconds']:.0f} s of the command, which composes and "
        "checks all points before and writes the report after.",
    ]
    return "\n".join([*lines, ""])
