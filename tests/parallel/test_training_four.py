"""Three optimizer steps of four ranks, divided in two ways at once, equal those of the local engine on one rank."""

import pytest

from tests.parallel.ranks import Check, Outcomes, run_on_ranks
from tests.parallel.test_training import LOCAL, MAIN, OTHER, ROUNDED, STAGES, checks_of, in_turn, named

pytestmark = pytest.mark.slow

LAYOUTS = ({"tensor": 2}, {"tensor": 2, "context": 2})
"""The other ranks are data parallel."""
MORE = ({"tensor": 2, "sequence": True}, {"tensor": 2, "context": 2, "sequence": True}, {"context": 2})
FLOAT32 = [
    *checks_of(LAYOUTS, MAIN, [LOCAL, *STAGES]),
    *checks_of(LAYOUTS[:1], OTHER, [LOCAL]),
    *checks_of(LAYOUTS[1:], OTHER, [3]),
    *checks_of(MORE, MAIN, [2]),
]
BFLOAT16 = in_turn(LAYOUTS, MAIN, (1, 3), dtype="bfloat16", changes=ROUNDED)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = tmp_path_factory.mktemp("four")
    return run_on_ranks("tests.parallel.equal_training", [*FLOAT32, *BFLOAT16], 4, folder, 900)


@pytest.mark.parametrize("check", FLOAT32, ids=named)
def test_four_ranks_train_as_one(outcomes: Outcomes, check: Check) -> None:
    assert [result["differ"] for result in outcomes.of(check)] == [""] * 4


@pytest.mark.parametrize("check", BFLOAT16, ids=named)
def test_four_ranks_train_as_one_in_bfloat16(outcomes: Outcomes, check: Check) -> None:
    assert [result["differ"] for result in outcomes.of(check)] == [""] * 4
