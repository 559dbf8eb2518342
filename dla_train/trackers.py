"""Where numbers of a run are written.

metrics.jsonl is the record: one line per logged step, cut back to the resumed step after a restart, so that it reads as
one uninterrupted run. TensorBoard and Weights & Biases get the same numbers, and histograms. Only rank 0 writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dla_train.config import Config, ConfigError
from dla_train.durable import write_atomically

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


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
    sinks: list[Sink] = [JsonLines(run_dir / METRICS_FILE, resumed_step)]
    if config.logging.tensorboard:
        sinks.append(TensorBoard(run_dir, resumed_step))
    if config.logging.wandb:
        sinks.append(WeightsAndBiases(config))
    return sinks
