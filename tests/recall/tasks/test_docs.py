"""docs/recall.md: its table names every task, field and default, and its examples run."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dla_train.recall.tasks.registry import build_task, task_names
from tests.recall.tasks.test_registry import EXAMPLES

TEXT = (Path(__file__).parents[3] / "docs/recall.md").read_text().split("## Tasks", 1)[1]
ROWS = {row[0].strip("`"): row for row in re.findall(r"^\| (`\w+`) \| (.*) \| (.*) \| (.*) \|$", TEXT, flags=re.M)}


def test_the_table_names_every_task() -> None:
    assert tuple(sorted(ROWS)) == tuple(sorted(task_names()))


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda values: values["name"])
def test_the_table_names_every_field_and_default(values: dict) -> None:
    named = re.findall(r"`(\w+)`(?: \(([^)]*)\))?", ROWS[values["name"]][2])
    documented = [(name, yaml.safe_load(default) if default else dataclasses.MISSING) for name, default in named]
    fields = dataclasses.fields(build_task(values))  # type: ignore[arg-type]
    assert documented == [(field.name, field.default) for field in fields]


def test_the_example_gives_the_shapes_it_names() -> None:
    code = re.search(r"```python\n(.*?)```", TEXT, flags=re.S)
    names: dict[str, Any] = {}
    exec(code[1], names)  # type: ignore[index]
    assert names["batch"].inputs.shape == (32, 128, 2) and names["batch"].targets.shape == (32, 128)
