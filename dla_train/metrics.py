"""Numbers of a run: where they are written, how fast it is, where its time goes.

metrics.jsonl is the record: one line per logged step, cut back to the resumed step after a restart, so that it reads as
one uninterrupted run. TensorBoard and Weights & Biases get the same numbers, and histograms. Only rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dla_train.config import Config, ConfigError
from dla_train.durable import write_atomically
from dla_train.models.cost import flops_per_token
from dla_train.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

PHASES = ("data", "exchange", "forward", "backward", "step")
"""Timed parts of a training step; the rest of it is `other`. Ranks wait for one another in `exchange`, where they sum
counts and losses; what layers and gradients communicate is part of forward, backward and step."""

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10": 125.0, "V100": 125.0}
"""Dense bfloat16 peak (V100: float16) by part of the device's name, TFLOP/s; data sheets, SXM parts."""


@dataclass(frozen=True)
class Histogram:
    """Counts of bins that follow one another."""

    edges: list[float]
    """Rising, one more than counts."""
    counts: list[float]


class Sink(Protocol):
    """Something that takes numbers."""

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Take the numbers of one step."""

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Take histograms of one step, by name."""

    def close(self) -> None:
        """Flush and end."""


class JsonLines:
    """One JSON object a line, flushed at once; opened after removing the lines beyond `resumed_step`."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line in read_lines(path) if line["step"] <= resumed_step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Nothing: of numbers, every head's are in memory.jsonl."""

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a crash cut off is left out. [] where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class TensorBoard:
    """Event files under `<run_dir>/tensorboard`."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        for name, found in histograms.items():
            edges, counts = np.array(found.edges), np.array(found.counts)
            middles = (edges[:-1] + edges[1:]) / 2  # the sums that the format asks for are known to a bin's width
            self._writer.add_histogram_raw(
                name,
                min=edges[0],
                max=edges[-1],
                num=counts.sum(),
                sum=(counts * middles).sum(),
                sum_squares=(counts * middles**2).sum(),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """wandb, online if it answers in time, else offline (files under run_dir, for `wandb sync`)."""

    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            mend = "pip install 'dla-train[wandb]', or set logging.wandb=false"
            raise ConfigError(f"logging.wandb=true needs the package wandb; {mend}") from error
        timeout = config.logging.wandb_init_timeout_seconds
        settings = wandb.Settings(init_timeout=timeout, silent=True)
        start: dict[str, Any] = {
            "project": config.logging.wandb_project,
            "name": config.name,
            "group": config.logging.wandb_group or None,
            "id": wandb_run_id(config.run_dir),
            "resume": "allow",
            "dir": config.run_dir,
            "settings": settings,
        }
        try:
            self._run = wandb.init(**start)
        except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
            reason = str(error).splitlines()[0]
            logger.warning("wandb is not reachable (%s); logging offline to %s/wandb", reason, config.run_dir)
            self._run = wandb.init(mode="offline", **start)

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        self._run.log(numbers, step=step)

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        import wandb

        found = {name: wandb.Histogram(np_histogram=(one.counts, one.edges)) for name, one in histograms.items()}
        self._run.log(found, step=step)

    def close(self) -> None:
        self._run.finish()


def wandb_run_id(run_dir: str) -> str:
    """The same id at every start in one run directory, so that a resumed run continues its curves."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in str(Path(run_dir).resolve()))[-120:].strip("-")


def open_sinks(config: Config, resumed_step: int) -> list[Sink]:
    """The sinks that logging.* asks for; call on rank 0 only, after run_dir exists."""
    run_dir = Path(config.run_dir)
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl", resumed_step)]
    if config.logging.tensorboard:
        sinks.append(TensorBoard(run_dir, resumed_step))
    if config.logging.wandb:
        sinks.append(WeightsAndBiases(config))
    return sinks


class PhaseClock:
    """Seconds of each phase of a step. On CUDA the times are of the device only where `synchronize` is set.

    Steps follow one another without a gap: what the loop does after a step, such as writing its line, counts as `other`
    of the next one. `restart` leaves out what is no part of training (validation, checkpoints).
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self.synchronize = False
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._started = time.perf_counter()

    def restart(self) -> None:
        """Begin the next step now."""
        self._started = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the block to one of PHASES."""
        started = self._now()
        yield
        self._seconds[name] += self._now() - started

    def end_step(self) -> dict[str, float]:
        """Seconds of the step and its phases, and `overhead`: the share that is neither the model's nor exchanged."""
        now = self._now()
        total, self._started = now - self._started, now
        other = total - sum(self._seconds.values())
        model = sum(self._seconds[name] for name in ("exchange", "forward", "backward", "step"))
        times = {f"seconds_{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return {"seconds": total, **times, "seconds_other": other, "overhead": 1.0 - model / total}

    def _now(self) -> float:
        if self._cuda is not None and self.synchronize:
            torch.cuda.synchronize(self._cuda)
        return time.perf_counter()


class SpeedMeter:
    """Tokens a second between two log lines, MFU, and the phases of the last step."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._mesh = mesh
        self._peak = peak_tflops(config.logging.peak_tflops, mesh.device)
        self._flops = flops_per_token(config.model, config.memory, config.data.context_tokens).training
        self._tokens, self._seconds = 0, 0.0
        self._times: dict[str, float] = {}

    def add(self, tokens: int, times: dict[str, float]) -> None:
        """Count a step over `tokens` tokens (all ranks) whose PhaseClock read `times`."""
        self._tokens += tokens
        self._seconds += times["seconds"]
        self._times = times

    def read(self) -> dict[str, float]:
        """Numbers since the last call. Collective: memory is the largest of any rank."""
        speed = self._tokens / self._seconds
        self._tokens, self._seconds = 0, 0.0
        numbers = {"tokens_per_second": speed}
        if self._peak:
            numbers["mfu"] = model_flops_utilisation(speed, self._flops, self._peak, self._mesh.size)
        return numbers | {"memory_bytes": self._mesh.max(peak_memory_bytes(self._mesh.device))} | self._times


def peak_tflops(configured: float, device: torch.device) -> float | None:
    """TFLOP/s of one device: the configured one, else by the device's name, else None (then there is no MFU)."""
    if configured:
        return configured
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def model_flops_utilisation(tokens_per_second: float, flops_per_token: float, peak: float, devices: int) -> float:
    """Share of the devices' peak (TFLOP/s each) that useful training FLOPs take."""
    return tokens_per_second * flops_per_token / (peak * 1e12 * devices)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on CUDA, resident (whole process) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
