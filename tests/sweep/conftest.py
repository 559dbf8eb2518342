"""Sweeps without training: a launcher whose runs are over at once, and leave what a run leaves."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dla_train.config import Config
from dla_train.hydra_app import compose
from dla_train.resilience.exit_codes import write_status
from dla_train.sweep.definition import SweepConfig, read_sweep
from tests.train.runs import TINY, write_corpus

SWEPT = tuple(word for word in TINY if not word.startswith("name=")) + (
    "train.device=cpu",
    "train.validation_batches=1",
    "train.validation_interval_steps=4",
    "data.train=[nowhere]",
    "data.validation=[nowhere]",
    "data.tokenizer=none",
)
"""A legal experiment, without data."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small prepared corpus, its held-out part and its tokenizer."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composing takes a sixth of a second, and the tests' points are much alike."""
    monkeypatch.setattr("dla_train.sweep.points.compose", lambda words: _compose(tuple(words)))


@functools.cache
def _compose(words: tuple[str, ...]) -> Config:
    return compose(list(words))


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., tuple[SweepConfig, list[str]]]:
    """sweep("sweep.seeds=[0,1]", ...) -> a small sweep in tmp_path/sweep and the overrides of its runs."""
    file = tmp_path / "small.yaml"
    file.write_text("settings: [memory=dla]\naxes: {memory.tau: [0.5, 0.7]}\nbaselines: {single: [memory=single]}\n")

    def make(*words: str) -> tuple[SweepConfig, list[str]]:
        return read_sweep([f"sweep={file}", f"sweep.folder={tmp_path}/sweep", *SWEPT, *words])

    return make


@dataclass
class FakeJob:
    """A run that ended as it began, or works until it is stopped or killed."""

    run_dir: Path
    ends: tuple[str, float]
    code: int | None = 0
    working: bool = False
    stops: int = 0

    def running(self) -> bool:
        return self.working

    def exit_code(self) -> int | None:
        return self.code

    def stop(self) -> None:
        self.stops += 1
        self.working, self.code = False, 75
        write_status(self.run_dir, "stopped", 4, 75)


@dataclass
class FakeLauncher:
    """Runs end as `script` says, by the name of the point's folder: a kind and a number."""

    script: Callable[[str, int], tuple[str, float]]
    places: int = 2
    started: list[str] = field(default_factory=list)
    jobs: list[FakeJob] = field(default_factory=list)
    adopted: dict[str, FakeJob] = field(default_factory=dict)
    most: int = 0
    _taken: int = 0

    def free(self) -> int:
        return self.places - self._taken

    def start(self, run_dir: Path, overrides: Sequence[str]) -> FakeJob:
        assert f"run_dir={run_dir}" in overrides
        self.started.append(run_dir.name)
        self._taken += 1
        self.most = max(self.most, self._taken)
        kind, number = self.script(run_dir.name, self.started.count(run_dir.name))
        job = FakeJob(run_dir, (kind, number))
        leave(job, kind, number)
        self.jobs.append(job)
        return job

    def adopt(self, run_dir: Path) -> FakeJob | None:
        job = self.adopted.pop(run_dir.name, None)
        self._taken += job is not None
        return job

    def release(self, job: FakeJob) -> None:
        self._taken -= 1


def leave(job: FakeJob, kind: str, number: float) -> None:
    """What a run of this kind of end leaves in its folder."""
    run_dir = job.run_dir
    if kind == "finishes":
        write_metrics(run_dir, {4: number + 1.0, 8: number})
        write_status(run_dir, "finished", 8, 0)
    elif kind == "works":
        write_metrics(run_dir, {4: number})
        write_status(run_dir, "running", 0, None)
        job.working = True
    elif kind == "diverges":
        job.code = 3
        write_status(run_dir, "diverged", 5, 3, "loss is nan")
    elif kind == "dies":
        job.code = int(number)
        write_status(run_dir, "running", 0, None)
    elif kind == "errs":
        job.code = int(number)
        (run_dir / "output.log").write_text("dla-train: error: data.train=[nowhere] is not there\n")
    else:
        raise ValueError(kind)


def write_metrics(run_dir: Path, validations: dict[int, float], spans: dict[str, float] | None = None) -> None:
    """A metrics.jsonl with training numbers every step, and these validation losses; by position only of the last."""
    lines = [
        {"step": step, "loss": 5.0 - step / 8, "boundary_rate": 0.25, "live_slots": 3.0, "tau": 0.6}
        | {"tokens_per_second": 1000.0}
        for step in range(1, max(validations) + 1)
    ]
    lines += [
        {"step": step, "validation_loss": value, "validation_bits_per_byte": value / 2}
        for step, value in validations.items()
    ]
    lines[-1] |= {f"validation_loss_{span}": value for span, value in (spans or {}).items()}
    text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"]))
    (run_dir / "metrics.jsonl").write_text(text)
