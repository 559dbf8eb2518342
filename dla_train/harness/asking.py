"""One unit through lm_eval: its metrics with standard errors, and what was asked and answered for every document.

lm_eval's `simple_evaluate` is not used: beside seeding, which is done here, it asks pip and the graphics driver for
their versions, seconds for every unit. Standard errors are computed here from the documents' values, as lm_eval does
for means; its bootstraps of other aggregations start processes and take minutes, and are left out.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lm_eval.api.task
import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.api.task import Task

from dla_train.harness.needles import hits
from dla_train.harness.settings import EvaluateConfig, Unit

Metrics = dict[str, dict[str, float | None]]
"""{metric: {value, stderr}}; accuracies from 0 to 1."""


def ask(model: LM, unit: Unit, config: EvaluateConfig, task: Task) -> tuple[Metrics, list[dict[str, Any]]]:
    """(metrics, samples) of a unit, `task` being its (build_task); it can be asked again. Seeds every generator."""
    task.set_config(key="num_fewshot", value=config.num_fewshot)
    task.set_fewshot_seed(seed=config.seed)
    seed_everything(config.seed)
    with _no_bars():
        found = evaluate(
            model,
            task_dict={"tasks": {unit.task.name: task}},
            limit=None if unit.length is not None else config.limit or None,
            bootstrap_iters=0,
        )
    assert found is not None
    documents = found["samples"][unit.task.name]
    samples = [_sample(unit, document) for document in documents]
    if unit.length is not None:
        return {unit.task.metric: _mean([sample[unit.task.metric] for sample in samples])}, samples
    aggregated = {key.partition(",")[0]: value for key, value in found["results"][unit.task.name].items() if "," in key}
    metrics: Metrics = {}
    for name in sorted({name for document in documents for name in document["metrics"]}):
        values = [document[name] for document in documents]
        metrics[name] = {"value": float(aggregated[name]), "stderr": _stderr(name, values, float(aggregated[name]))}
    return metrics, samples


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without lm_eval's bar of building prompts, which has no setting; the model's own counts requests."""
    before = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = functools.partial(before, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = before


def seed_everything(seed: int) -> None:
    """Seed what lm_eval may draw from, as its own command does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _sample(unit: Unit, document: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a document: which it is, the answers, and its values."""
    kept = {"document": document["doc_id"], "hash": document["doc_hash"], "answers": document["filtered_resps"]}
    if unit.length is None:
        return {**kept, **{name: document[name] for name in document["metrics"]}}
    doc = document["doc"]
    named = hits(str(document["filtered_resps"][0]), doc["outputs"])
    value = document[str(unit.length)]
    return {**kept, unit.task.metric: value, "depths": doc["depths"], "hits": named, "tokens": doc["length"]}


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    mean = sum(values) / len(values)
    return {"value": mean, "stderr": _stderr("mean", values, mean)}


def _stderr(name: str, values: Sequence[Any], value: float) -> float | None:
    """Of the mean of one number a document; of a perplexity by the slope of exp. None for what is neither."""
    if len(values) < 2 or not all(isinstance(one, int | float) for one in values):
        return None
    mean = sum(values) / len(values)
    error = math.sqrt(sum((one - mean) ** 2 for one in values) / (len(values) - 1) / len(values))
    return error * value if name == "perplexity" else error
