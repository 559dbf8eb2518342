"""The runs of a study: which there are, what is kept of each, and the processes that do them.

A finished run is one JSON file and is never repeated; a study that was killed goes on by the same command. A file of
other settings is an error, not overwritten. A run that fails is reported with its reason, and the others go on.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dla_train.config import Config, ConfigError
from dla_train.durable import write_atomically
from dla_train.parallel.cores import available_cores
from dla_train.parallel.mesh import pick_device
from dla_train.recall.arms import Arm, study_arms, study_tasks
from dla_train.recall.settings import StudyConfig
from dla_train.recall.training import Judgement, RunResult, train_run

SHARED = (
    "task",
    "parts",
    "weights",
    "decay_rate",
    "step_size",
    "steps",
    "batch_rows",
    "curve_interval_steps",
    "curve_rows",
    "held_out_rows",
)
"""Settings of a study that every run's numbers depend on, beside those of its arm."""


@dataclass(frozen=True)
class Run:
    """One run to do."""

    arm: Arm
    learning_rate: float
    seed: int
    split: str
    """Rows it is judged on: `held_out`, or `tuning` of a run that chooses the learning rate."""

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.arm.name}_lr{self.learning_rate:g}_seed{self.seed}"


@dataclass(frozen=True)
class StudyRuns:
    """Everything that was run, or failed, in a study."""

    arms: list[Arm]
    rates: dict[str, float]
    """Learning rate of every arm by name."""
    tuning: dict[str, dict[float, dict[int, float]]]
    """Mean accuracy over the parts by arm, learning rate and tuning seed, 0 of a run that failed; of no other arms than
    those with something to choose."""
    results: dict[str, dict[int, RunResult]]
    """By arm and seed; a seed that failed is absent."""
    failures: dict[str, str]
    """Reason by name of the run."""


def output_folder(study: StudyConfig) -> Path:
    """Where a study's files go."""
    return Path(study.output or f"runs/recall/{study.name}")


def run_study(study: StudyConfig) -> StudyRuns:
    """Do what is not yet done. Raises ConfigError for settings that cannot be, or that differ from those there."""
    tasks = study_tasks(study)
    arms = study_arms(study, tasks)
    pick_device(study.device, "device")
    folder = output_folder(study) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    tuned_arms = [arm for arm in arms if len(study.learning_rates) > 1 and arm.name not in study.rates]
    tuning_runs = [
        Run(arm, rate, seed, "tuning")
        for seed in study.tuning_seeds
        for arm in tuned_arms
        for rate in study.learning_rates
    ]
    planned = len(tuning_runs) + len(arms) * len(study.seeds)
    failures: dict[str, str] = {}
    processes = study.processes or available_cores()
    with Workers(study, folder, processes) as workers, _bar(study, planned) as bar:
        tuning = tuning_accuracies(tuning_runs, _done(workers, tuning_runs, bar, failures))
        rates = {arm.name: study.learning_rates[0] for arm in arms} | study.rates
        rates |= {name: best_rate(tried) for name, tried in tuning.items()}
        runs = [Run(arm, rates[arm.name], seed, "held_out") for seed in study.seeds for arm in arms]
        found = _done(workers, runs, bar, failures)
    results: dict[str, dict[int, RunResult]] = {arm.name: {} for arm in arms}
    for run, result in found:
        results[run.arm.name][run.seed] = result
    return StudyRuns(arms, rates, tuning, results, failures)


class Workers:
    """Processes that do runs, one thread each: small models gain nothing from more."""

    def __init__(self, study: StudyConfig, folder: Path, processes: int) -> None:
        self._study, self._folder = study, folder
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin_worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            for process in multiprocessing.active_children():
                process.terminate()

    def do(self, runs: Iterable[Run]) -> Iterator[tuple[Run, RunResult | Exception]]:
        """Each run with its result, as they end; those on disk come first. Raises ConfigError for other settings."""
        started: dict[Future[RunResult], Run] = {}
        ended: list[tuple[Run, RunResult]] = []
        for run in runs:
            path, identity = self._folder / f"{run.name}.json", identity_of(run, self._study)
            kept = read_run(path, identity)
            if kept is not None:
                ended.append((run, kept))
            else:
                started[self._pool.submit(do_run, run, self._study, path)] = run
        yield from ended
        for future in as_completed(started):
            error = future.exception()
            if error is not None and not isinstance(error, FloatingPointError):
                raise error
            yield started[future], error if isinstance(error, FloatingPointError) else future.result()


def _begin_worker() -> None:
    """One thread for torch; an interrupt is the first process's to hear; and no run outlives that process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def do_run(run: Run, study: StudyConfig, path: Path) -> RunResult:
    """Train, judge and write the file; its name appears when it is whole."""
    config, device = run.arm.run(run.learning_rate, run.seed), pick_device(study.device, "device")
    result = train_run(study, config, study_tasks(study), run.split, device)
    write_atomically(path, json.dumps({"identity": identity_of(run, study), **dataclasses.asdict(result)}, indent=1))
    return result


def identity_of(run: Run, study: StudyConfig) -> dict[str, Any]:
    """Everything a run's numbers depend on, as plain JSON: studies may share runs."""
    config: Config = run.arm.run(run.learning_rate, run.seed)
    settings = {name: dataclasses.asdict(getattr(config, name)) for name in ("model", "memory", "optim")}
    del settings["model"]["name"]
    whole = {"split": run.split, "seed": run.seed, **settings, **{name: getattr(study, name) for name in SHARED}}
    return json.loads(json.dumps(whole))


def read_run(path: Path, identity: Mapping[str, Any]) -> RunResult | None:
    """What a run left, None if it has not ended. Raises ConfigError where the file is damaged or of other settings."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        there = found.pop("identity")
        result = as_result(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); remove it, and its run is done again") from error
    other = [key for key in identity if there.get(key) != identity[key]]
    if other:
        raise ConfigError(
            f"{path} is a run of other settings ({', '.join(other)} differ); choose another output=..., or remove it"
        )
    return result


def as_result(found: dict[str, Any]) -> RunResult:
    """A run's result of its plain values. Raises KeyError, TypeError or ValueError where they are none."""
    parts = {part: Judgement(**judged) for part, judged in found["parts"].items()}
    curve = [(int(step), dict(accuracies)) for step, accuracies in found["curve"]]
    return RunResult(**{**found, "parts": parts, "curve": curve})


def _bar(study: StudyConfig, planned: int) -> tqdm[Any]:
    return tqdm(total=planned, desc=study.name, unit="run", disable=not study.progress, dynamic_ncols=True)


def _done(
    workers: Workers, runs: Sequence[Run], bar: tqdm[Any], failures: dict[str, str]
) -> list[tuple[Run, RunResult]]:
    found = []
    for run, result in workers.do(runs):
        bar.update()
        if isinstance(result, Exception):
            failures[run.name] = str(result)
        else:
            bar.set_postfix_str(f"{run.name} {100 * _mean_accuracy(result):.1f}%")
            found.append((run, result))
    return found


def _mean_accuracy(result: RunResult) -> float:
    return sum(judged.accuracy for judged in result.parts.values()) / len(result.parts)


def tuning_accuracies(
    planned: Iterable[Run], ended: Iterable[tuple[Run, RunResult]]
) -> dict[str, dict[float, dict[int, float]]]:
    """`StudyRuns.tuning` of the runs that were planned, and of those that ended well."""
    accuracies = {run.name: _mean_accuracy(result) for run, result in ended}
    found: dict[str, dict[float, dict[int, float]]] = {}
    for run in planned:
        by_seed = found.setdefault(run.arm.name, {}).setdefault(run.learning_rate, {})
        by_seed[run.seed] = accuracies.get(run.name, 0.0)
    return found


def best_rate(tried: Mapping[float, Mapping[int, float]]) -> float:
    """The rate of the highest mean accuracy, the lower one of equals."""
    return max(sorted(tried), key=lambda rate: sum(tried[rate].values()))
