"""Tasks by name, and what every one of them promises its trainer."""

import dataclasses
from typing import Any

import pytest
import torch

from dla_train.recall.tasks.errors import RecallError
from dla_train.recall.tasks.paired_token import PairedToken
from dla_train.recall.tasks.registry import build_task, task_names
from dla_train.recall.tasks.streams import SPLITS, stream
from dla_train.recall.tasks.task import IGNORED
from tests.recall.tasks.examples import EXAMPLES


def test_every_task_has_an_example_here() -> None:
    assert {example["name"] for example in EXAMPLES} == set(task_names())


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda values: values["name"])
def test_batches_keep_what_the_interface_promises(values: dict) -> None:
    task = build_task(values)
    batch = task.batch(16, stream(0, "train"))
    columns = len(task.vocabulary)
    assert batch.inputs.shape == (16, task.tokens) + ((columns,) if columns > 1 else ())
    assert batch.targets.shape == (16, task.tokens)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.device.type == "cpu" and batch.inputs.min() >= 0
    highest = batch.inputs.reshape(-1, columns).max(dim=0).values
    assert all(int(top) < size for top, size in zip(highest, task.vocabulary, strict=True))
    scored = batch.targets[batch.targets != IGNORED]
    assert scored.min() >= 0 and scored.max() < task.answers
    assert ((batch.targets != IGNORED).sum(dim=1) > 0).all()


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda values: values["name"])
def test_batches_depend_on_the_generator_alone_and_move_it_on(values: dict) -> None:
    task, generator = build_task(values), stream(0, "train")
    torch.manual_seed(1)
    first, second = task.batch(8, generator), task.batch(8, generator)
    torch.manual_seed(2)
    again = build_task(values).batch(8, stream(0, "train"))
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, second.inputs)


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda values: values["name"])
def test_no_row_of_one_split_is_a_row_of_another(values: dict) -> None:
    task = build_task(values)
    rows = {tuple(row.flatten().tolist()) for split in SPLITS for row in task.batch(64, stream(0, split)).inputs}
    assert len(rows) == 64 * len(SPLITS)


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda values: values["name"])
def test_tasks_are_values_that_compare_and_hash(values: dict) -> None:
    task = build_task(values)
    assert task == build_task(values) and hash(task) == hash(build_task(values))
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.tokens = 3


def test_fields_are_taken_and_the_rest_have_their_defaults() -> None:
    assert build_task({"name": "paired_token", "needles": 48, "values": 8}) == PairedToken(48, values=8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "mqra"}, "name='mqra' is not a recall task; did you mean mqar? choose from "),
        ({"needles": 3}, "name=None is not a recall task; choose from paired_token, mqar, "),
        ({"name": ["mqar"]}, "name=['mqar'] is not a recall task; "),
        (
            {"name": "paired_token", "needle": 3},
            "paired_token: needle=3 is not one of its fields; did you mean needles? choose from needles, tokens, ",
        ),
        ({"name": "mqar"}, "mqar: pairs is not given and has no default; give pairs: ..."),
        (None, "task=None is not a mapping; give name: ... and the fields of that task"),
    ],
)
def test_mistakes_are_named_with_the_nearest_name(values: Any, message: str) -> None:
    with pytest.raises(RecallError) as error:
        build_task(values)
    assert str(error.value).startswith(message)
