"""Five optimizer steps of four ranks, divided in two ways at once, equal those of the local engine on one rank."""

import pytest

from tests.parallel.ranks import Check, Outcomes, run_on_ranks
from tests.parallel.test_training import KINDS, LOCAL, MAIN, ROUNDED, STAGES, checks_of, named

LAYOUTS = ({"tensor": 2}, {"tensor": 2, "context": 2}, {"tensor": 2, "sequence": True}, {"context": 2})
"""The other ranks are data parallel."""
FLOAT32 = [*checks_of(LAYOUTS[:2], KINDS, [LOCAL]), *checks_of(LAYOUTS, MAIN, STAGES)]
BFLOAT16 = checks_of(LAYOUTS[:2], MAIN, STAGES, dtype="bfloat16", changes=ROUNDED)
OTHERS = checks_of(LAYOUTS, [kind for kind in KINDS if kind not in MAIN], STAGES)


def run(checks: list[Check], tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_on_ranks("tests.parallel.equal_training", checks, 4, tmp_path_factory.mktemp("four"), 900)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run([*FLOAT32, *BFLOAT16], tmp_path_factory)


@pytest.fixture(scope="module")
def other_outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run(OTHERS, tmp_path_factory)


@pytest.mark.parametrize("check", FLOAT32, ids=named)
def test_four_ranks_train_as_one(outcomes: Outcomes, check: Check) -> None:
    assert [result["differ"] for result in outcomes.of(check)] == [""] * 4


@pytest.mark.parametrize("check", BFLOAT16, ids=named)
def test_four_ranks_train_as_one_in_bfloat16(outcomes: Outcomes, check: Check) -> None:
    assert [result["differ"] for result in outcomes.of(check)] == [""] * 4


@pytest.mark.slow(reason="minutes: the policies that differ from those above in what they plan alone")
@pytest.mark.parametrize("check", OTHERS, ids=named)
def test_four_ranks_train_as_one_with_every_policy(other_outcomes: Outcomes, check: Check) -> None:
    assert [result["differ"] for result in other_outcomes.of(check)] == [""] * 4
