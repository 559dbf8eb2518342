"""The launcher of the parallel tests says which check failed, on which rank, and why."""

from pathlib import Path

import pytest

from tests.parallel.ranks import Check, run_on_ranks

FINE, WRONG, LATER = Check("fine"), Check("wrong_on_rank_1", arguments={"number": 7}), Check("fine", sequence=True)


def test_a_failing_check_is_named_with_its_rank_and_message_and_earlier_ones_keep_their_results(tmp_path: Path) -> None:
    outcomes = run_on_ranks("tests.parallel.failing_cases", [FINE, WRONG, LATER], 2, tmp_path)
    assert outcomes.of(FINE) == [{"rank": 0.0}, {"rank": 1.0}]
    with pytest.raises(AssertionError, match=r"wrong_on_rank_1(.|\n)*failed on rank 1(.|\n)*ArithmeticError: 7 is wr"):
        outcomes.of(WRONG)
    with pytest.raises(
        AssertionError, match=r"sequence=True.* was not finished on rank\(s\) \[0, 1\].*wrong_on_rank_1"
    ):
        outcomes.of(LATER)


def test_a_rank_that_is_killed_is_reported_in_the_launcher_s_words(tmp_path: Path) -> None:
    outcomes = run_on_ranks("tests.parallel.failing_cases", [Check("killed_on_rank_0")], 2, tmp_path)
    with pytest.raises(AssertionError, match=r"not finished on rank\(s\) \[0, 1\](.|\n)*SIGKILL"):
        outcomes.of(Check("killed_on_rank_0"))
