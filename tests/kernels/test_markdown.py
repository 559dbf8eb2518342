"""Tables of pages: what a reader of Markdown sees is what was given."""

import re

import pytest

from dla_kernels.markdown import markdown_table


def test_a_table_is_its_head_a_rule_and_its_rows():
    assert markdown_table(["", "time"], iter([["one", "2 s"], ["two", ""]])) == (
        "|  | time |\n|---|---|\n| one | 2 s |\n| two |  |"
    )


def test_a_table_without_rows_is_its_head():
    assert markdown_table(["a"], []) == "| a |\n|---|"


def test_the_rule_says_which_columns_are_flush_right():
    assert markdown_table(["name", "count"], [], right=["count"]).splitlines()[1] == "|---|---:|"


def test_a_bar_in_a_cell_does_not_end_it():
    lines = markdown_table(["p(a|b)", "c"], [["d|", "||"]]).splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert [[cell.strip().replace(r"\|", "|") for cell in line] for line in (cells[0], cells[2])] == [
        ["p(a|b)", "c"],
        ["d|", "||"],
    ]


@pytest.mark.parametrize("row", [["short"], ["too", "long", "a row"], []])
def test_a_row_without_the_columns_of_the_head_is_named(row):
    with pytest.raises(ValueError, match=re.escape(f"the row {row} has {len(row)} cells")):
        markdown_table(["a", "b"], [["c", "d"], row])
