"""Gradients are summed over ranks while backward runs, whatever parameters it reaches."""

import pytest

from tests.parallel.ranks import Check, Outcomes, run_on_ranks

CHECKS = [Check("summed"), Check("summed", arguments={"unused": True})]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_on_ranks("tests.engine.gradient_cases", CHECKS, 2, tmp_path_factory.mktemp("gradients"))


@pytest.mark.parametrize("check", CHECKS, ids=["all used", "a layer not used on one rank"])
def test_gradients_are_those_of_all_ranks_and_micro_batches(outcomes: Outcomes, check: Check) -> None:
    assert [result["wrong"] for result in outcomes.of(check)] == ["", ""]


def test_sums_begin_while_backward_runs(outcomes: Outcomes) -> None:
    """Of five buckets a step one waits for a layer that takes no part; on rank 1 of the other case three in step 2."""
    assert [(result["early"], result["late"]) for result in outcomes.of(CHECKS[0])] == [(8, 2), (8, 2)]
    assert [(result["early"], result["late"]) for result in outcomes.of(CHECKS[1])] == [(8, 2), (6, 4)]
