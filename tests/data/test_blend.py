"""Dealing rows to sources: exact sums, bounded error at every prefix, growth by at most one, phases, ledgers."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_train.data.blend import Blend, Dealer, Phase, Start

weights_of_sources = st.dictionaries(
    st.sampled_from("abcdefghijk"), st.integers(1, 10**6).map(lambda n: Fraction(n, 7)), min_size=1, max_size=11
)


def shares(weights: dict[str, Fraction]) -> dict[str, Fraction]:
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


@given(weights=weights_of_sources, rows=st.integers(0, 10**15))
def test_counts_sum_to_the_rows_and_stay_near_the_weights(weights: dict[str, Fraction], rows: int) -> None:
    counts = Dealer(weights).counts(rows)
    assert sum(counts.values()) == rows and counts.keys() == weights.keys()
    bound = Fraction(math.ceil(math.log2(len(weights))), 2)
    assert all(abs(counts[name] - rows * share) <= bound for name, share in shares(weights).items())


@settings(max_examples=40)
@given(weights=weights_of_sources, first=st.integers(0, 10**12))
def test_every_row_goes_to_exactly_one_source(weights: dict[str, Fraction], first: int) -> None:
    dealer = Dealer(weights)
    before = dealer.counts(first)
    for rows in range(first + 1, first + 50):
        after = dealer.counts(rows)
        assert sorted(after[name] - before[name] for name in after) == [0] * (len(after) - 1) + [1]
        before = after


def test_weights_are_exact_however_long_the_run() -> None:
    dealer = Dealer({"a": Fraction("0.1"), "b": Fraction("0.2"), "c": Fraction("0.7")})
    assert dealer.counts(10**30) == {"a": 10**29, "b": 2 * 10**29, "c": 7 * 10**29}


def test_the_order_in_which_sources_are_written_does_not_matter() -> None:
    one, other = ({name: Fraction(ord(name)) for name in names} for names in ("abcde", "edcba"))
    assert all(Dealer(one).counts(rows) == Dealer(other).counts(rows) for rows in range(100))


def blend(*phases: tuple[int, dict[str, int]], rows: int = 10, start: Start | None = None) -> Blend:
    made = [Phase(step, {name: Fraction(w) for name, w in weights.items()}, 16) for step, weights in phases]
    return Blend(made, rows, start)


def test_a_phase_begins_and_a_source_with_weight_0_keeps_its_place() -> None:
    run = blend((0, {"a": 1, "b": 1}), (4, {"a": 1, "b": 0}), (6, {"a": 1, "b": 3, "c": 1}))
    assert run.names == ["a", "b", "c"]
    assert run.ledger(4) == {"a": 20, "b": 20, "c": 0}
    assert run.ledger(6) == {"a": 40, "b": 20, "c": 0}
    assert run.ledger(8) == {"a": 44, "b": 32, "c": 4}
    assert [run.phase(step).start_step for step in (0, 3, 4, 5, 6, 99)] == [0, 0, 4, 4, 6, 6]


@settings(max_examples=60)
@given(
    starts=st.lists(st.integers(1, 60), unique=True, max_size=4).map(sorted),
    weights=st.lists(st.fixed_dictionaries({n: st.integers(0, 5) for n in "abc"}), min_size=5, max_size=5),
    cut=st.integers(0, 80),
    rows=st.integers(1, 13),
)
def test_counting_from_any_step_equals_counting_from_the_beginning(
    starts: list[int], weights: list[dict[str, int]], cut: int, rows: int
) -> None:
    phases = [(step, w if any(w.values()) else {"a": 1}) for step, w in zip([0, *starts], weights, strict=False)]
    whole = blend(*phases, rows=rows)
    resumed = blend(*phases, rows=rows, start=Start(cut, whole.ledger(cut)))
    for step in range(cut, 100, 7):
        assert {k: v for k, v in resumed.ledger(step).items() if v} == {
            k: v for k, v in whole.ledger(step).items() if v
        }
        assert sum(whole.ledger(step).values()) == step * rows
    if cut:
        with pytest.raises(ValueError, match="lies before"):
            resumed.ledger(cut - 1)


def test_the_ledger_of_a_distant_step_needs_no_replay() -> None:
    assert blend((0, {"a": 1}), (10**9, {"a": 1, "b": 2}), rows=3).ledger(10**15)["b"] == 2 * (10**15 - 10**9)


def test_timelines_are_equal_exactly_where_the_dealing_is() -> None:
    base = blend((0, {"a": 1, "b": 1}), (5, {"a": 3, "b": 1}))
    same = blend((0, {"a": 2, "b": 2, "c": 0}), (5, {"a": 6, "b": 2}), (9, {"a": 1}))
    assert base.timeline(9) == same.timeline(9) and base.timeline(10) != same.timeline(10)
    assert base.timeline(5) == blend((0, {"a": 1, "b": 1})).timeline(5) and base.timeline(0) == []
    assert base.timeline(6) != blend((0, {"a": 1, "b": 1}), (4, {"a": 3, "b": 1})).timeline(6)
    assert base.timeline(6) != blend((0, {"a": 1, "b": 1}), (5, {"a": 3, "b": 2})).timeline(6)
