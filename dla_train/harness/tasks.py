"""lm_eval's tasks, built for a unit of an evaluation: on local copies, from the hub, or generated.

lm_eval's own definition is loaded from the installed package and only the place of the documents is changed, by
its hook `custom_dataset`; so prompts, filters and metrics are lm_eval's. The tasks that it defines as Python classes
(SQuAD, SWDE, FDA) take no configuration; their `download` is overridden.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from datasets import Dataset, disable_progress_bars
from datasets.exceptions import DatasetsError
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks.fda.task import FDA
from lm_eval.tasks.squad_completion.task import SQUADCompletion
from lm_eval.tasks.swde.task import SWDE

from dla_train.harness.catalogue import TaskEntry
from dla_train.harness.documents import local_files, read_documents
from dla_train.harness.errors import EvaluateError
from dla_train.harness.needles import Needles, install_sentences
from dla_train.harness.settings import EvaluateConfig, Unit

PACKAGED = Path(lm_eval.__file__).parent / "tasks"
CLASSES: dict[str, type[ConfigurableTask]] = {"squad_completion": SQUADCompletion, "swde": SWDE, "fda": FDA}
"""Tasks that are Python classes in lm_eval."""
Documents = Callable[..., dict[str, Dataset]]
"""lm_eval's `custom_dataset`: called with the task's metadata, gives the documents by split."""


def build_task(unit: Unit, config: EvaluateConfig, needles: Needles | None) -> Task:
    """The task of a unit, its documents loaded. Raises EvaluateError where they cannot be had."""
    entry = unit.task
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every setting that is not its default
    disable_progress_bars()  # of preparing documents, which takes no time
    if needles is not None and unit.length is not None:
        install_sentences()
        return _load(entry, _needle_changes(entry, unit.length, needles))
    if config.data_dir is not None:
        files = local_files(Path(config.data_dir), entry, config.num_fewshot)
        if entry.name in CLASSES:
            return _class_task(entry, lambda: _read(files, entry.columns))
        return _load(entry, {"custom_dataset": _documents(files, entry.columns), **_splits(entry, config.num_fewshot)})
    try:
        return _class_task(entry, None) if entry.name in CLASSES else _load(entry, {})
    except (DatasetsError, OSError) as error:
        raise EvaluateError(
            f"{entry.name}: its data set {entry.hub} cannot be loaded ({str(error).splitlines()[0]}); name local "
            "copies with data_dir=..., or write them where there is a network: dla-evaluate fetch suite=all "
            f"tasks=[{entry.name}] data_dir=..."
        ) from error


def _load(entry: TaskEntry, changes: dict[str, Any]) -> Task:
    """lm_eval's task with some keys of its definition changed."""
    manager = TaskManager(include_path=(PACKAGED / entry.file).parent, include_defaults=False)
    group = {"group": "evaluated", "task": [{"task": entry.name, **changes}]}
    with warnings.catch_warnings():  # of a package for comparing code, which no task here does
        warnings.filterwarnings("ignore", "Using slow pure-python SequenceMatcher", UserWarning)
        return manager.load(group)["tasks"][entry.name]


def _read(files: dict[str, Path], columns: Sequence[str]) -> dict[str, Dataset]:
    return {split: Dataset.from_list(read_documents(path, columns)) for split, path in files.items()}


def _documents(files: dict[str, Path], columns: Sequence[str]) -> Documents:
    def documents(version: object = None, config_source: object = None) -> dict[str, Dataset]:
        return _read(files, columns)

    return documents


def _splits(entry: TaskEntry, num_fewshot: int) -> dict[str, str | None]:
    """Splits that have no local copy are switched off, or lm_eval would look for them."""
    evaluated = "test_split" if entry.split == "test" else "validation_split"
    absent = dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
    return {**absent, evaluated: entry.split, "training_split": entry.few_shot_split if num_fewshot else None}


def _needle_changes(entry: TaskEntry, length: int, needles: Needles) -> dict[str, Any]:
    from lm_eval.tasks.ruler.common_utils import aggregate_metrics

    def documents(version: object = None, config_source: object = None) -> dict[str, Dataset]:
        return {"test": Dataset.from_list(needles.documents(entry.name, length))}

    metrics = [
        {"metric": name, "aggregation": aggregate_metrics, "higher_is_better": True}
        for name in dict.fromkeys((str(length), "4096"))  # lm_eval gives every document a value for 4096, of -1
    ]
    return {"custom_dataset": documents, "metric_list": metrics}


def _class_task(entry: TaskEntry, read: Callable[[], dict[str, Dataset]] | None) -> Task:
    base = CLASSES[entry.name]

    def download(self: ConfigurableTask, dataset_kwargs: dict[str, Any] | None = None) -> None:
        assert read is not None
        self.dataset = read()

    task = base() if read is None else type(base.__name__, (base,), {"download": download})()
    task.config.task = entry.name
    return task
