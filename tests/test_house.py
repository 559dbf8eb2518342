"""What of the house's state is a rule (`python -m tests.house` prints the rest)."""

import ast

import pytest

from tests.house import (
    ROOT,
    Source,
    bare_arguments,
    duplicates,
    function_lines,
    import_cycles,
    sources,
    undocumented,
    unread_options,
)
from tests.mutations import MUTATIONS, Mutation

FILES = sources()


def test_no_modules_import_each_other() -> None:
    assert import_cycles(FILES) == []


def test_every_public_name_has_a_docstring() -> None:
    assert undocumented(FILES) == []


def test_every_argument_is_annotated() -> None:
    assert sum(bare_arguments(source)[0] for source in FILES) == 0


def test_every_option_is_read() -> None:
    assert unread_options(FILES) == []


def planted(module: str, text: str) -> Source:
    return Source(ROOT / "dla_train" / f"{module}.py", text)


def test_what_breaks_a_rule_is_found() -> None:
    one = planted("one", '"""Doc."""\nimport dla_train.two\n\n\ndef open(path):\n    return path\n')
    two = planted("two", '"""Doc."""\nfrom dla_train import one\n\n\ndef _own(path: str) -> str:\n    return path\n')
    assert import_cycles([one, two]) == [["dla_train.one", "dla_train.two"]]
    assert undocumented([one, two]) == ["dla_train.one.open"]
    assert bare_arguments(one) == (1, 1) and bare_arguments(two) == (0, 1)
    config = planted("config", "class Part:\n    taken: int\n    by_name: int\n    spelt_minutes: int\n    left: int\n")
    reader = planted("reader", 'def read(part, kind):\n    part.taken, "by_name", f"{kind}_minutes"\n')
    assert unread_options([config, reader]) == ["Part.left"]


def test_lines_that_stand_twice_are_found_whatever_lies_between_them() -> None:
    lines = [f"x = {number}" for number in range(6)]
    first, second = planted("one", "\n".join(lines)), planted("two", "\n\n# why\n".join(["y = 1", *lines]))
    assert duplicates([first, second]) == [("dla_train/one.py:1", "dla_train/two.py:4")]
    assert duplicates([first, planted("two", "\n".join(lines[1:]))]) == []


def test_lines_of_code_are_counted_without_comments_and_docstrings() -> None:
    source = planted("one", '"""Doc.\n\nMore."""\n\n# why\ndef f():\n    """Doc."""\n    return 1  # what\n')
    assert list(source.code.values()) == ["def f():", "return 1"]
    assert function_lines(source) == {"f": 2}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_is_of_a_line_that_is_there(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.right) == 1 and (ROOT / mutation.tests).exists()
    ast.parse(text.replace(mutation.right, mutation.wrong))
