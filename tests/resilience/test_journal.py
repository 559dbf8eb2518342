"""Which data a step reads is a function of the journal and the step."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dla_train.resilience.journal import (
    JOURNAL_FILE,
    JournalError,
    Rewind,
    append_to_journal,
    data_position,
    data_step,
    read_journal,
)


def rewind(begin: int, end: int) -> Rewind:
    return Rewind(at_step=end, to_step=begin, from_data_step=begin, until_data_step=end, reason="test")


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=5))
def test_steps_read_every_data_step_that_is_not_passed_over_in_order(ranges: list[tuple[int, int]]) -> None:
    rewinds = [rewind(begin, begin + size) for begin, size in ranges]
    passed = {step for begin, size in ranges for step in range(begin, begin + size)}
    left = [step for step in range(200) if step not in passed]
    assert [data_step(step, rewinds) for step in range(100)] == left[:100]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 10))
def test_the_cursor_of_a_checkpoint_stays_true_when_a_later_rewind_goes_back_to_it(
    done: int, later: int, size: int
) -> None:
    before = [rewind(5, 9)]
    begin = data_position(done, before) + later
    assert data_position(done, [*before, rewind(begin, begin + size)]) == data_position(done, before)


def test_nothing_is_read_before_the_first_step() -> None:
    assert data_position(0, [rewind(0, 4)]) == 0 and data_position(1, [rewind(0, 4)]) == 5


def test_entries_are_read_back_in_order(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == []
    for number in range(3):
        append_to_journal(tmp_path, rewind(number, number + 2))
    assert read_journal(tmp_path) == [rewind(number, number + 2) for number in range(3)]


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        json.dumps({"at_step": 1}),
        json.dumps({"at_step": 1, "to_step": 1, "from_data_step": "1", "until_data_step": 2, "reason": ""}),
    ],
)
def test_a_line_that_is_no_entry_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    append_to_journal(tmp_path, rewind(0, 1))
    with (tmp_path / JOURNAL_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(JournalError, match=rf"{JOURNAL_FILE}:2 is not an entry"):
        read_journal(tmp_path)
