"""`dla-evaluate fetch`: write the local copies of a suite's documents, once, on a machine with a network.

Each split is written whole under another name before it gets its own, and one that is there is kept: a fetch that was
cut off goes on by the same command. The folder can then be copied to machines without a network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dla_train.durable import write_atomically
from dla_train.harness.documents import HAYSTACK, local_files
from dla_train.harness.errors import EvaluateError
from dla_train.harness.settings import EvaluateConfig, units

ESSAYS = "baber/paul_graham_essays"
"""The haystack of RULER's essay tasks, as lm_eval has it."""
Load = Callable[..., Iterable[dict[str, Any]]]
"""(data set, subset, split=...) -> its documents; `datasets.load_dataset`."""


def fetch(config: EvaluateConfig, load: Load | None = None) -> list[Path]:
    """Write what an evaluation with these settings reads; returns the files that were written.

    Raises EvaluateError without data_dir, and where a data set cannot be had.
    """
    if config.data_dir is None:
        raise EvaluateError(
            "data_dir has no value; name the folder to write: dla-evaluate fetch suite=all data_dir=..."
        )
    folder, written = Path(config.data_dir), []
    load = load or _load_dataset
    for entry in {unit.task.name: unit.task for unit in units(config)}.values():
        if entry.needles:
            written += _once(folder / HAYSTACK, lambda: _essays(load))
            continue
        for split, path in local_files(folder, entry, config.num_fewshot).items():
            written += _once(path, lambda: _lines(load(str(entry.hub), entry.subset, split=split)))  # noqa: B023
    return written


def _once(path: Path, pieces: Callable[[], Iterable[str]]) -> list[Path]:
    """Write the file unless it is there."""
    if path.is_file():
        print(f"{path} is there")
        return []
    made = pieces()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(made))
    print(f"{path} written ({path.stat().st_size:,} bytes)")
    return [path]


def _lines(documents: Iterable[dict[str, Any]]) -> Iterable[str]:
    return (json.dumps(document, ensure_ascii=False, default=str) + "\n" for document in documents)


def _essays(load: Load) -> Iterable[str]:
    return [" ".join(str(document["text"]) for document in load(ESSAYS, None, split="train"))]


def _load_dataset(name: str, subset: str | None, *, split: str) -> Iterable[dict[str, Any]]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise EvaluateError("fetching needs datasets; run `pip install dla-train[evaluate]`") from error
    try:
        found: Iterable[dict[str, Any]] = load_dataset(name, subset, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        raise EvaluateError(
            f"the data set {name} ({split}) cannot be had: {error}; check the network, or copy the folder from "
            "elsewhere"
        ) from error
    return found
