"""Three optimizer steps at every layout and engine, on two ranks, equal those of the local engine on one rank."""

import json

import pytest

from tests.parallel.ranks import Check, Outcomes, chosen, run_on_ranks, slow_but

KINDS = [(b, p) for b in ("mamba2", "gated_deltanet") for p in ("single", "log_linear", "fixed", "dla")]
KINDS.append(("attention", "none"))
MAIN = [("mamba2", "dla"), ("gated_deltanet", "dla"), ("attention", "none")]
OTHER = [kind for kind in KINDS if kind not in MAIN]
LAYOUTS = ({}, {"tensor": 2}, {"tensor": 2, "sequence": True}, {"context": 2})
LOCAL, STAGES = -1, (1, 2, 3)
ROUNDED = json.dumps({"engine.weights": "bfloat16"})
OFFLOADED = json.dumps({"engine.offload_optimizer": True})
SEGMENTS = json.dumps({"train.segment_tokens": 8})
BOTH = json.dumps({"engine.weights": "bfloat16", "engine.offload_optimizer": True})


def checks_of(layouts, kinds, stages, **more):
    """One for each layout, kind and engine."""
    return [
        Check("differences", **layout, arguments={"backbone": b, "policy": p, "stage": stage, **more})
        for layout in layouts
        for b, p in kinds
        for stage in stages
    ]


def in_turn(layouts, kinds, stages, **more):
    """One for each layout and kind, with one of the stages each, so that stages meet every layout and every kind."""
    places = [(layout, kind) for layout in range(len(layouts)) for kind in range(len(kinds))]
    return [
        check
        for a, b in places
        for check in checks_of(layouts[a : a + 1], kinds[b : b + 1], [stages[(a + b) % len(stages)]], **more)
    ]


FLOAT32 = [
    *checks_of(LAYOUTS, MAIN, [LOCAL, *STAGES]),
    *checks_of(LAYOUTS[3:], MAIN, [LOCAL], packed=False),
    # the other kinds differ in their parameters and plans, which test_models.py compares at every layout: here where
    # tokens are divided too, and each at one stage
    *checks_of(LAYOUTS[2:], OTHER, [LOCAL]),
    *in_turn(LAYOUTS[2:3], OTHER[::2], STAGES),
    *in_turn(LAYOUTS[3:], OTHER[1::2], STAGES),
    *checks_of(LAYOUTS[1:], MAIN[:1], [0]),
    *checks_of(LAYOUTS[2:], MAIN[:1], STAGES, changes=OFFLOADED),
    *checks_of(LAYOUTS, MAIN[:1], [LOCAL], changes=SEGMENTS),
    *checks_of(LAYOUTS[2:], MAIN[:1], [1, 3], changes=SEGMENTS),
    *checks_of(LAYOUTS[2:], MAIN[1:2], [LOCAL], changes=SEGMENTS),
]
BFLOAT16 = [
    *checks_of(LAYOUTS, MAIN, [LOCAL], dtype="bfloat16"),
    *in_turn(LAYOUTS[:1] + LAYOUTS[2:], MAIN, STAGES, dtype="bfloat16", changes=ROUNDED),
    *in_turn(LAYOUTS[1:], MAIN[:1], STAGES, dtype="bfloat16", changes=BOTH),
]
BUGS = [
    *checks_of(LAYOUTS[:1], MAIN[:1], [LOCAL], bug="no gradients of other rows"),
    *checks_of(LAYOUTS[:1], MAIN[:1], [2], bug="micro-batches averaged"),
    *checks_of(LAYOUTS[1:2], MAIN[:1], [1], bug="divided parameters unmarked"),
]
STARTS = [
    Check("initial_differences", **layout, arguments={"stage": stage, "weights": weights})
    for layout in LAYOUTS
    for stage, weights in ((LOCAL, "float32"), (3, "bfloat16"))
]
STARTS += [
    Check("initial_differences", **layout, arguments={"stage": stage, "weights": weights})
    for layout, stage, weights in zip(LAYOUTS, (3, 1, 3, 1), ("float32", "bfloat16") * 2, strict=True)
]
POISONED = [
    Check("poisoned", **layout, arguments={"stage": stage, "weights": "float32"})
    for number, layout in enumerate(LAYOUTS)
    for stage in (LOCAL, number, (number + 2) % 4)
]
POISONED += [Check("poisoned", tensor=2, arguments={"stage": stage, "weights": "bfloat16"}) for stage in STAGES]


DECIDING = [check for kind in MAIN[:2] for check in checks_of(LAYOUTS[:1], [kind], [LOCAL])]
"""The local engine on the kinds with a dynamic memory."""
FAST = [
    *DECIDING,
    *in_turn(LAYOUTS, MAIN, [LOCAL, *STAGES]),
    *in_turn(LAYOUTS[1:], MAIN[:1], STAGES, dtype="bfloat16", changes=BOTH),
    *checks_of(LAYOUTS[2:3], MAIN[:1], [1], changes=SEGMENTS),
    *STARTS[1::4],
    *POISONED[::4],
]
"""Every layout with every kind, at one engine each, and one or two of all else: the others are slow."""


def named(check: Check) -> str:
    """The layout, and what the check's arguments say."""
    a = check.arguments
    layout = f"tensor{check.tensor} context{check.context}{' sequence' if check.sequence else ''}"
    engine = "local" if a["stage"] == LOCAL else f"zero{a['stage']}"
    return " ".join([layout, engine, *(str(value) for key, value in a.items() if key != "stage")])


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = tmp_path_factory.mktemp("training")
    checks = chosen([*FLOAT32, *BFLOAT16, *BUGS, *STARTS, *POISONED], request)
    return run_on_ranks("tests.parallel.equal_training", checks, 2, folder, 900)


@pytest.mark.parametrize("check", slow_but(FAST, FLOAT32), ids=named)
def test_two_ranks_train_as_one(outcomes: Outcomes, check: Check) -> None:
    assert [result["differ"] for result in outcomes.of(check)] == ["", ""]


@pytest.mark.parametrize("check", slow_but(FAST, BFLOAT16), ids=named)
def test_two_ranks_train_as_one_in_bfloat16(outcomes: Outcomes, check: Check) -> None:
    assert [result["differ"] for result in outcomes.of(check)] == ["", ""]


@pytest.mark.parametrize("check", BUGS, ids=lambda check: check.arguments["bug"])
def test_a_planted_bug_is_found(outcomes: Outcomes, check: Check) -> None:
    assert all(result["differ"] for result in outcomes.of(check))


@pytest.mark.parametrize("check", slow_but(FAST, STARTS), ids=named)
def test_every_layout_and_engine_starts_from_the_same_numbers(outcomes: Outcomes, check: Check) -> None:
    assert [result["differ"] for result in outcomes.of(check)] == ["", ""]


@pytest.mark.parametrize("check", slow_but(FAST, POISONED), ids=named)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(outcomes: Outcomes, check: Check) -> None:
    assert [result["differ"] for result in outcomes.of(check)] == ["", ""]


@pytest.mark.parametrize("check", DECIDING, ids=named)
def test_the_memories_of_these_runs_decide_both_ways(outcomes: Outcomes, check: Check) -> None:
    """A memory in which every token, or none, begins a slot would hide a decision that differs."""
    assert all(0.05 < float(result["boundary_rate"]) < 0.95 for result in outcomes.of(check))
    assert all(float(result["live_slots"]) > 2 for result in outcomes.of(check))
