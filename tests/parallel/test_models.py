"""Every backbone and policy, divided by heads, along time and by context, equals one rank: loss, logits, gradients."""

import json

import pytest

from tests.parallel.ranks import Check, Outcomes, run_on_ranks

KINDS = [(b, p) for b in ("mamba2", "gated_deltanet") for p in ("single", "log_linear", "fixed", "dla")]
KINDS.append(("attention", "none"))
VARIANTS = (
    {"num_key_heads": 1},
    {"closed_slots": "frozen", "recompute": True},
    {"routing": "projected", "routing_dim": 3, "tie_embeddings": True},
    {"tau_control": "learned", "conv_width": 0},
)
LAYOUTS = {
    2: ({"tensor": 2}, {"tensor": 2, "sequence": True}, {"context": 2}),
    4: ({"tensor": 2, "context": 2}, {"tensor": 2, "context": 2, "sequence": True}, {"tensor": 4}, {"tensor": 2}),
}
BUGS = ("no sum of partial gradients", "two sections swapped", "state crosses a document")


def checks_of(ranks: int) -> list[Check]:
    """Every kind and variant at every layout of two ranks, the dynamic memory and attention at those of four."""
    cases = [(b, p, {}, packed) for b, p in KINDS for packed in (False, True)]
    cases += [(b, "dla", v, True) for b in ("mamba2", "gated_deltanet") for v in VARIANTS]
    if ranks == 4:
        cases = [case for case in cases if case[1] in ("dla", "none") and case[3]]
    return [
        Check(
            "differences", **layout, arguments={"backbone": b, "policy": p, "packed": packed, "changes": json.dumps(v)}
        )
        for layout in LAYOUTS[ranks]
        for b, p, v, packed in cases
    ]


PLANTED = [
    Check(
        "differences",
        tensor=2,
        sequence=True,
        arguments={"backbone": "gated_deltanet", "policy": "dla", "packed": True, "bug": bug},
    )
    for bug in BUGS
]
CHECKS = {2: checks_of(2) + PLANTED, 4: checks_of(4)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcomes]:
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in CHECKS}
    return {n: run_on_ranks("tests.parallel.equal_models", CHECKS[n], n, folders[n]) for n in CHECKS}


def named(check: Check) -> str:
    a = check.arguments
    layout = f"tensor{check.tensor} context{check.context}{' sequence' if check.sequence else ''}"
    return (
        f"{layout} {a['backbone']} {a['policy']} {'packed' if a['packed'] else 'one document'} {a.get('changes', '')}"
    )


@pytest.mark.parametrize("check", checks_of(2), ids=named)
def test_two_ranks_equal_one(outcomes: dict[int, Outcomes], check: Check) -> None:
    assert [result["differ"] for result in outcomes[2].of(check)] == ["", ""]


@pytest.mark.parametrize("check", checks_of(4), ids=named)
def test_four_ranks_equal_one(outcomes: dict[int, Outcomes], check: Check) -> None:
    assert [result["differ"] for result in outcomes[4].of(check)] == [""] * 4


@pytest.mark.parametrize("check", PLANTED, ids=BUGS)
def test_a_planted_bug_is_found(outcomes: dict[int, Outcomes], check: Check) -> None:
    assert all(result["differ"] for result in outcomes[2].of(check))
