"""An evaluation: every unit of a suite, each kept when it is finished, and the files at the end.

Whatever decides a unit's numbers stands in its result. One that is there with the same settings is not repeated; one
with others is an error, never overwritten and never mixed. What was answered of the unit in work is in its journal.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dla_train.checkpoint.folders import write_atomically
from dla_train.checkpoint.manifest import parse_json, read_small
from dla_train.checkpoint.run_lock import RunLock
from dla_train.config import ConfigError
from dla_train.config_rules import longest_context
from dla_train.harness.heat_map import write_heat_map
from dla_train.harness.inputs import check_files, needle_samples, needles_of
from dla_train.harness.journal import Journal, check_identity, check_journal
from dla_train.harness.loading import OpenedRun, open_run
from dla_train.harness.report import table
from dla_train.harness.settings import EvaluateConfig, Unit, units

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
    (output / UNITS).mkdir(parents=True, exist_ok=True)
    lock = RunLock(output)
    try:
        results = _run_units(config, opened, wanted, files, output)
    finally:
        lock.release()
    write_atomically(output / RESULTS, json.dumps(_summary(config, opened, results), indent=1))
    write_atomically(output / TABLE, table(config.suite.tables, results, _title(opened)))
    if any(unit.length is not None for unit in wanted):
        write_heat_map(output, results)
    return output


def _run_units(
    config: EvaluateConfig, opened: OpenedRun, wanted: list[Unit], files: dict[str, dict[str, str]], output: Path
) -> dict[str, dict[str, Any]]:
    """Results by unit: those that are there, and the others, one after the other."""
    settings = {unit.name: _settings(config, opened, unit, files) for unit in wanted}
    results = {unit.name: _finished(output, unit, settings[unit.name]) for unit in wanted}
    worker = None
    for number, unit in enumerate(wanted, 1):
        found = results[unit.name]
        if found is None:
            worker = worker or _Worker(config, opened, output)
            found = worker.run(unit, settings[unit.name], f"{number}/{len(wanted)} {unit.name}")
            results[unit.name] = found
        print(_line(unit, found), flush=True)
    return {name: result for name, result in results.items() if result is not None}


class _Worker:
    """What asks lm_eval, made when there is something to ask: its import takes seconds."""

    def __init__(self, config: EvaluateConfig, opened: OpenedRun, output: Path) -> None:
        from dla_train.harness.model import DlaModel

        self.config, self.opened, self.output = config, opened, output
        self.model = DlaModel(
            opened.model,
            opened.tokenizer,
            max_length=_max_length(config, opened),
            bos=opened.bos,
            batch_tokens=config.batch_tokens,
            decode_rows=config.decode_rows,
            progress=config.progress,
        )

    def run(self, unit: Unit, settings: dict[str, Any], title: str) -> dict[str, Any]:
        """Evaluate a unit and keep its result and samples."""
        from dla_train.harness.asking import ask
        from dla_train.harness.tasks import build_task

        began = time.perf_counter()
        journal = Journal(_journal_path(self.output, unit), settings)
        before = len(journal)
        needles = needles_of(self.config, unit, self.opened.tokenizer, self.opened.bos)
        task = build_task(unit, self.config, needles)
        with self.model.unit(title, unit.length or self.model.max_length, journal) as counts:
            metrics, samples = ask(self.model, unit, self.config, task)
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


def _summary(config: EvaluateConfig, opened: OpenedRun, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
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
        "device": {"name": _device_name(opened), "python": platform.python_version()},
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
