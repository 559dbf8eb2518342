"""Every backbone and policy, divided by heads, along time and by context, equals one rank: loss, logits, gradients."""

import json

import pytest

from dla_train.models.cost import merge_cache_bytes
from dla_train.parallel.axes import Axes
from tests.parallel.equal_models import configs
from tests.parallel.ranks import Check, Outcomes, chosen, run_on_ranks, slow_but

KINDS = [(b, p) for b in ("mamba2", "gated_deltanet") for p in ("single", "log_linear", "fixed", "dla")]
KINDS.append(("attention", "none"))
VARIANTS = (
    {"num_key_heads": 1},
    {"closed_slots": "frozen", "tau": 1.2, "recompute": True},  # segments of several tokens: else nothing decays
    {"routing": "qk", "tie_embeddings": True},
    {"tau_control": "learned", "conv_width": 0},
    {"conv_bias": True},
    {"conv_bias": True, "num_key_heads": 1},
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
CARRIED = {
    2: [
        Check("carried", **layout, arguments={"backbone": b, "changes": json.dumps(changes)})
        for layout in ({"tensor": 2}, {"context": 2})
        for b in ("mamba2", "gated_deltanet")
        for changes in ({}, {"num_key_heads": 1})
    ],
    4: [Check("carried", tensor=2, context=2, arguments={"backbone": b}) for b in ("mamba2", "gated_deltanet")],
}
CHECKS = {2: checks_of(2) + PLANTED, 4: checks_of(4)}
FAST_OF_FOUR = [check for check in CHECKS[4] if check.tensor == check.context == 2]
"""Two axes divided at once; one axis of four ranks, and two groups of two, are slow."""


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcomes]:
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in CHECKS}
    checks = {ranks: [*chosen(CHECKS[ranks], request), *CARRIED[ranks]] for ranks in CHECKS}
    return {n: run_on_ranks("tests.parallel.equal_models", checks[n], n, folders[n]) for n in CHECKS}


def named(check: Check) -> str:
    a = check.arguments
    layout = f"tensor{check.tensor} context{check.context}{' sequence' if check.sequence else ''}"
    return (
        f"{layout} {a['backbone']} {a['policy']} {'packed' if a['packed'] else 'one document'} {a.get('changes', '')}"
    )


@pytest.mark.parametrize("check", checks_of(2), ids=named)
def test_two_ranks_equal_one(outcomes: dict[int, Outcomes], check: Check) -> None:
    assert [result["differ"] for result in outcomes[2].of(check)] == ["", ""]


@pytest.mark.parametrize("check", slow_but(FAST_OF_FOUR, CHECKS[4]), ids=named)
def test_four_ranks_equal_one(outcomes: dict[int, Outcomes], check: Check) -> None:
    assert [result["differ"] for result in outcomes[4].of(check)] == [""] * 4


@pytest.mark.parametrize("check", PLANTED, ids=BUGS)
def test_a_planted_bug_is_found(outcomes: dict[int, Outcomes], check: Check) -> None:
    assert all(result["differ"] for result in outcomes[2].of(check))


@pytest.mark.parametrize("ranks", CARRIED)
def test_merge_caches_are_carried_between_rows_and_keep_the_size_that_is_printed(
    outcomes: dict[int, Outcomes], ranks: int
) -> None:
    """The size is the documented formula's for a rank's heads, and moves with neither context nor step."""
    for check in CARRIED[ranks]:
        model, memory = configs(check.arguments["backbone"], "dla", json.loads(check.arguments.get("changes", "{}")))
        heads, keys = model.num_heads // ranks, max(model.num_key_heads // ranks, 1)
        # states, routing sums, gates and the taps' window; then counts, scores, fill and position of 8 bytes
        numbers = heads * memory.capacity * (4 * 6 + memory.routing_dim + 1) + 3 * (
            heads * 6 + 2 * keys * (4 + memory.routing_dim)
        )
        others = heads * memory.capacity * 16 + 8 * heads + 8
        axes = Axes.planned(tensor=check.tensor, context=check.context)
        assert merge_cache_bytes(model, memory, axes, rows=2) == 2 * 2 * (4 * numbers + others)
        for result in outcomes[ranks].of(check):
            assert result["error"] < 1e-9
            sizes = {result[moment] for moment in ("empty", "after_16", "after_48", "after_a_step")}
            assert sizes == {2 * 2 * (8 * numbers + others)}  # these models compute in float64
