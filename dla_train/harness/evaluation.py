"""An evaluation: every unit of a suite, each kept when it is finished, and the files at the end.

Whatever decides a unit's numbers stands in its result. One that is there with the same settings is not repeated; one
with others is an error, never overwritten and never mixed. What was answered of the unit in work is in its journal.
Under torchrun rank 0 reads and writes the files and the others help it to answer: model.py shares the batches.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dla_train.checkpoint.errors import CheckpointError, RunDirectoryError
from dla_train.checkpoint.manifest import parse_json, read_small
from dla_train.checkpoint.run_lock import RunLock
from dla_train.config import ConfigError, ParallelConfig
from dla_train.config_rules import longest_context
from dla_train.durable import write_atomically
from dla_train.harness.errors import EvaluateError
from dla_train.harness.heat_map import write_heat_map
from dla_train.harness.inputs import check_files, needle_samples, needles_of
from dla_train.harness.journal import AnswersOfAnother, Journal, check_identity, check_journal
from dla_train.harness.loading import OpenedRun, open_run
from dla_train.harness.report import table
from dla_train.harness.settings import EvaluateConfig, Unit, units
from dla_train.parallel.mesh import Mesh

if TYPE_CHECKING:
    from dla_train.harness.asking import Metrics
    from dla_train.harness.model import Counts, DlaModel

RESULTS, TABLE, UNITS = "results.json", "results.md", "units"
VERSIONS = ("dla-train", "lm_eval", "torch", "datasets", "transformers", "numpy")


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluate a checkpoint; returns the folder with results.json and results.md.

    Everything that can be found wrong is found before the first unit. Raises EvaluateError, ConfigError, and what
    `open_run` raises.
    """
    wanted = units(config)
    files = check_files(config, wanted)
    opened = open_run(config.run, step=config.step, device=config.device, dtype=config.dtype, bos=config.bos)
    _check_lengths(config, opened, wanted)
    output = Path(config.output or f"{config.run}/evaluation/step_{opened.step}")
    with ranks_of_a_launcher(config, opened) as mesh:
        worker = _Worker(config, opened, output, mesh)
        if mesh.is_writer:
            _lead(worker, wanted, files)
        else:
            worker.follow(wanted)
    return output


def ranks_of_a_launcher(config: EvaluateConfig, opened: OpenedRun) -> Mesh:
    """The processes that torchrun started, each with the whole model; else this one alone, without any group."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Mesh(0, 1, opened.model.embedding.weight.device, owns_group=False)
    train = replace(opened.config.train, device=config.device)
    return Mesh.start(replace(opened.config, parallel=ParallelConfig(), train=train))


def _lead(worker: _Worker, wanted: list[Unit], files: dict[str, dict[str, str]]) -> None:
    """Every unit that is not finished, with the other ranks, and the files at the end. On rank 0."""
    config, opened, output = worker.config, worker.opened, worker.output
    settings = {unit.name: _settings(config, opened, unit, files) for unit in wanted}
    try:
        (output / UNITS).mkdir(parents=True, exist_ok=True)
        lock = RunLock(output)
    except (OSError, RunDirectoryError):
        worker.dismiss()
        raise
    try:
        results = _results(worker, wanted, settings)
    finally:
        lock.release()
    write_atomically(output / RESULTS, json.dumps(_summary(worker, results), indent=1))
    write_atomically(output / TABLE, table(config.suite.tables, results, _title(opened)))
    if any(unit.length is not None for unit in wanted):
        write_heat_map(output, results)


def _results(worker: _Worker, wanted: list[Unit], settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results by unit: those that are there, and the others, one after the other."""
    try:
        known = {unit.name: _finished(worker.output, unit, settings[unit.name]) for unit in wanted}
    except (EvaluateError, CheckpointError):
        worker.dismiss()
        raise
    results = {}
    for number, unit in enumerate(wanted, 1):
        title = f"{number}/{len(wanted)} {unit.name}"
        found = known[unit.name] or worker.run(unit, settings[unit.name], title)
        results[unit.name] = found
        print(_line(unit, found), flush=True)
    worker.dismiss()
    return results


class _Worker:
    """What asks lm_eval, on every rank; its model is made when there is something to ask: the import takes seconds."""

    def __init__(self, config: EvaluateConfig, opened: OpenedRun, output: Path, mesh: Mesh) -> None:
        self.config, self.opened, self.output, self.mesh = config, opened, output, mesh

    def run(self, unit: Unit, settings: dict[str, Any], title: str) -> dict[str, Any]:
        """Evaluate a unit with the other ranks, and keep its result and samples. On rank 0."""
        began = time.perf_counter()
        journal = Journal(_journal_path(self.output, unit), settings)
        before = len(journal)
        self.mesh.from_writer((unit.name, journal.answers))
        metrics, samples, counts = self._ask(unit, title, journal)
        write_atomically(
            self.output / UNITS / f"{unit.name}.samples.jsonl",
            "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples),
        )
        result = {
            "task": unit.task.name,
            "length": unit.length,
            "metrics": metrics,
            "documents": len({sample["document"] for sample in samples}),
            "counts": {**asdict(counts), "answered_before": before},
            "seconds": round(time.perf_counter() - began, 3),
            "settings": settings,
        }
        write_atomically(_result_path(self.output, unit), json.dumps(result, indent=1))
        journal.path.unlink()
        return result

    def follow(self, wanted: list[Unit]) -> None:
        """Work on what rank 0 runs, until it says that there is no more. On the other ranks."""
        by_name = {unit.name: unit for unit in wanted}
        while (asked := self.mesh.from_writer(None)) is not None:
            name, answers = asked
            self._ask(by_name[name], name, AnswersOfAnother(answers))

    def dismiss(self) -> None:
        """Let the other ranks end."""
        self.mesh.from_writer(None)

    def _ask(
        self, unit: Unit, title: str, journal: Journal | AnswersOfAnother
    ) -> tuple[Metrics, list[dict[str, Any]], Counts]:
        from dla_train.harness.asking import ask
        from dla_train.harness.tasks import build_task

        task = build_task(unit, self.config, needles_of(self.config, unit, self.opened.tokenizer, self.opened.bos))
        with self._model.unit(title, unit.length or self._model.max_length, journal) as counts:
            return *ask(self._model, unit, self.config, task), counts

    @functools.cached_property
    def _model(self) -> DlaModel:
        from dla_train.harness.model import DlaModel

        return DlaModel(
            self.opened.model,
            self.opened.tokenizer,
            max_length=_max_length(self.config, self.opened),
            bos=self.opened.bos,
            batch_tokens=self.config.batch_tokens,
            decode_rows=self.config.decode_rows,
            progress=self.config.progress and self.mesh.is_writer,
            mesh=self.mesh,
        )


def _settings(
    config: EvaluateConfig, opened: OpenedRun, unit: Unit, files: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """What decides a unit's numbers, beyond rounding."""
    common = {
        "checkpoint": opened.checkpoint,
        "tokenizer": opened.tokenizer.fingerprint,
        "bos": opened.bos,
        "dtype": opened.config.train.dtype,
        "max_length": unit.length or _max_length(config, opened),
        "num_fewshot": config.num_fewshot,
        "limit": config.limit,
        "seed": config.seed,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "documents": files[unit.name],
    }
    return common if unit.length is None else {**common, "samples": needle_samples(config)}


def _finished(output: Path, unit: Unit, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result that is there. Raises EvaluateError if it, or what was answered so far, is of other settings."""
    path = _result_path(output, unit)
    if not path.is_file():
        check_journal(_journal_path(output, unit), settings)
        return None
    result = parse_json(path, read_small(path))
    check_identity(path, result.get("settings"), settings)
    return result


def _check_lengths(config: EvaluateConfig, opened: OpenedRun, wanted: list[Unit]) -> None:
    longest = longest_context(opened.config.memory)
    for unit in wanted:
        length = unit.length or _max_length(config, opened)
        if longest is not None and length > longest:
            key = "suite.lengths" if unit.length else "max_length"
            raise ConfigError(
                f"{key}: {unit.name} would be read in {length} tokens, and memory.policy=log_linear with "
                f"memory.capacity={opened.config.memory.capacity} holds at most {longest}; choose shorter ones, or "
                "train with more capacity"
            )


def _max_length(config: EvaluateConfig, opened: OpenedRun) -> int:
    return config.max_length or opened.config.data.context_tokens


def _result_path(output: Path, unit: Unit) -> Path:
    return output / UNITS / f"{unit.name}.json"


def _journal_path(output: Path, unit: Unit) -> Path:
    return output / UNITS / f"{unit.name}.journal"


def _line(unit: Unit, result: dict[str, Any]) -> str:
    found = result["metrics"][unit.task.metric]
    scale = 100 if unit.task.percent else 1
    spread = "" if found["stderr"] is None else f" +- {scale * found['stderr']:.2f}"
    cut = f", {result['counts']['truncated']} truncated" if result["counts"]["truncated"] else ""
    value = f"{unit.task.metric} {scale * found['value']:.2f}{spread}"
    return f"{unit.name}: {value} ({result['documents']} documents{cut}, {result['seconds']:.0f} s)"


def _title(opened: OpenedRun) -> str:
    return f"{opened.config.name}, step {opened.step}"


def _summary(worker: _Worker, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    config, opened = worker.config, worker.opened
    model = opened.config.model
    return {
        "run": str(config.run),
        "step": opened.step,
        "checkpoint_manifest_sha256": opened.checkpoint,
        "model": {"name": model.name, "backbone": model.backbone, "policy": opened.config.memory.policy},
        "tokenizer": {"name": opened.tokenizer.name, "fingerprint": opened.tokenizer.fingerprint},
        "bos": opened.bos,
        "settings": asdict(config),
        "seeds": dict.fromkeys(("random", "numpy", "torch", "fewshot", "needles"), config.seed),
        "versions": {name: _version(name) for name in VERSIONS},
        "device": {"name": _device_name(opened), "python": platform.python_version(), "ranks": worker.mesh.size},
        "units": results,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(opened: OpenedRun) -> str:
    device = opened.model.embedding.weight.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
