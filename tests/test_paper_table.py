"""Section 11 of docs/dla.md names functions and tests that are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTION = (
    (ROOT / "docs" / "dla.md").read_text(encoding="utf-8").partition("## 11.")[2].partition("What the paper leaves")[0]
)
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)(?:: (\w+))?`", SECTION)))


def path_of(name: str) -> Path:
    places = (ROOT / "kernels" / "dla_kernels", ROOT / "dla_train", ROOT / "tests")
    (found,) = [place / name for place in places if (place / name).is_file()]
    return found


def test_the_table_is_read() -> None:
    assert len(NAMED) > 20


@pytest.mark.parametrize(("file", "function"), NAMED)
def test_what_the_table_names_is_there(file: str, function: str) -> None:
    tree = ast.parse(path_of(file).read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert not function or function in names
