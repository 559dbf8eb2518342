"""Paired tokens: what is asked was given, the last value counts, filler is of its kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_train.recall.tasks.errors import RecallError
from dla_train.recall.tasks.filler import FILLERS
from dla_train.recall.tasks.paired_token import PLACEMENTS, PairedToken
from dla_train.recall.tasks.streams import stream
from dla_train.recall.tasks.task import IGNORED
from tests.recall.tasks.bounds import within
from tests.recall.tasks.reading import asked, last_writes, rows_of


@st.composite
def tasks(draw: st.DrawFn) -> PairedToken:
    needles = draw(st.integers(1, 70))
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    queries = draw(st.integers(1, 20))
    needed = needles + round(share * needles) + min(needles, queries)
    return PairedToken(
        needles=needles,
        tokens=needed + draw(st.integers(0, 90)),
        keys=needles + draw(st.integers(0, 600)),
        values=draw(st.integers(2, 9)),
        queries=queries,
        filler=draw(st.sampled_from(FILLERS)),
        filler_types=draw(st.integers(1, 5)),
        run_tokens=draw(st.integers(1, 6)),
        overwritten=share,
        placement=draw(st.sampled_from(PLACEMENTS)),
    )


@settings(max_examples=80, deadline=None)
@given(tasks(), st.integers(0, 5))
def test_every_row_read_token_by_token_answers_with_the_last_value_of_a_key_that_was_given(
    task: PairedToken, seed: int
) -> None:
    count = min(task.needles, task.queries)
    for inputs, targets in rows_of(task.batch(3, stream(seed, "train"))):
        assert len(inputs) == len(targets) == task.tokens
        assert asked(targets) == list(range(task.tokens - count, task.tokens))
        given, queries = inputs[:-count], inputs[-count:]
        needles = [(key, value) for key, value in given if key < task.keys]
        memory = last_writes(needles)
        assert len(memory) == task.needles and len(needles) == task.needles + task.rewrites
        assert all(0 <= value < task.values for _, value in needles)
        assert all(
            key - task.keys == value - task.values < task.filler_types for key, value in given if key >= task.keys
        )
        assert len({key for key, _ in queries}) == count
        assert {value for _, value in queries} == {task.vocabulary[1] - 1}
        assert [memory[key] for key, _ in queries] == targets[-count:]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 5))
def test_an_overwritten_value_was_another_one(needles: int, seed: int) -> None:
    task = PairedToken(needles, tokens=3 * needles, values=2, overwritten=1.0)
    for inputs, _ in rows_of(task.batch(4, stream(seed, "train"))):
        values: dict[int, list[int]] = {}
        for key, value in inputs[: -task.asked]:
            if key < task.keys:
                values.setdefault(key, []).append(value)
        assert all(len(given) == 2 and given[0] != given[1] for given in values.values())


def test_overwritten_keys_are_asked_as_often_as_others() -> None:
    task = PairedToken(24, tokens=52, queries=4, overwritten=0.25)
    keys = task.batch(3000, stream(0, "train")).inputs[:, :, 0]
    times_given = (keys[:, 48:, None] == keys[:, None, :48]).sum(dim=2)
    assert all(within(int((times == 2).sum()), 3000, 1 / 4) for times in times_given.T)


def filler_of(task: PairedToken, rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a position of the first part is filler, and the type there, [B, C] each."""
    keys = task.batch(rows, stream(1, "train")).inputs[:, : -task.asked, 0]
    return keys >= task.keys, keys - task.keys


def test_stable_filler_changes_only_at_needles_and_there_to_any_type() -> None:
    filler, types = filler_of(PairedToken(24))
    neighbours = filler[:, 1:] & filler[:, :-1]
    assert (types[:, 1:] == types[:, :-1])[neighbours].all()
    around = filler[:, 2:] & ~filler[:, 1:-1] & filler[:, :-2]  # one needle between two filler tokens
    same = (types[:, 2:] == types[:, :-2])[around]
    assert within(int(same.sum()), same.numel(), 1 / 4)


def test_random_filler_is_of_any_type_at_every_token() -> None:
    filler, types = filler_of(PairedToken(24, filler="random"))
    neighbours = filler[:, 1:] & filler[:, :-1]
    same = (types[:, 1:] == types[:, :-1])[neighbours]
    assert within(int(same.sum()), same.numel(), 1 / 4)
    chosen = types[filler]
    assert all(within(int((chosen == kind).sum()), chosen.numel(), 1 / 4) for kind in range(4))


def test_drifting_filler_goes_on_to_the_next_type_at_its_rate_and_not_at_needles() -> None:
    filler, types = filler_of(PairedToken(24, filler="drifting", run_tokens=8))
    rows = [row[kept] for row, kept in zip(types, filler, strict=True)]
    steps = torch.cat([row.diff() % 4 for row in rows])
    assert set(steps.tolist()) == {0, 1}
    assert within(int(steps.sum()), steps.numel(), 1 / 8)
    assert all(within(int(sum(int(row[0]) == kind for row in rows)), len(rows), 1 / 4) for kind in range(4))


def test_runs_of_filler_have_their_length_whatever_the_needles_do() -> None:
    filler, types = filler_of(PairedToken(24, filler="runs", run_tokens=4, filler_types=50), rows=50)
    changes = set()
    for row, kept in zip(types, filler, strict=True):
        changed = row[kept].diff().nonzero().flatten() + 1
        changes |= {int(place) % 4 for place in changed}
    assert changes == {0}


def test_needles_lie_anywhere_in_the_first_part_and_any_of_them_is_asked() -> None:
    task = PairedToken(24)
    filler, _ = filler_of(task, rows=2000)
    context = task.tokens - 16
    assert all(within(int(count), 2000, 24 / context) for count in (~filler).sum(dim=0))
    batch = task.batch(2000, stream(2, "train"))
    keys = batch.inputs[:, :, 0]
    order = (keys[:, :context] < 64).cumsum(dim=1)  # the how-manieth needle a needle is
    place = (keys[:, context:, None] == keys[:, None, :context]).int().argmax(dim=2)
    asked_needles = order.gather(1, place).flatten()
    assert all(within(int((asked_needles == n).sum()), 2000, 16 / 24) for n in range(1, 25))
    assert all(within(int((batch.targets[:, -1] == value).sum()), 2000, 1 / 64) for value in range(64))


def test_needles_that_lie_together_are_one_stretch_that_begins_anywhere_in_any_order() -> None:
    task = PairedToken(needles=3, tokens=11, keys=3, overwritten=0.34, placement="together")
    filler, _ = filler_of(task, rows=4000)
    first = filler.int().argmin(dim=1)
    assert all(within(int((first == place).sum()), 4000, 1 / 5) for place in range(5))
    offsets = torch.arange(8)[None] - first[:, None]
    assert torch.equal(~filler, (offsets >= 0) & (offsets < 4))
    keys = task.batch(4000, stream(1, "train")).inputs[:, :8, 0]
    newest = keys.gather(1, first[:, None] + 3)[:, 0]
    assert all(within(int((newest == key).sum()), 4000, 1 / 3) for key in range(3))


def test_the_documented_ids_are_used_and_no_others() -> None:
    task = PairedToken(48, overwritten=0.5)
    batch = task.batch(300, stream(0, "train"))
    assert task.vocabulary == (68, 69) and task.answers == 64
    assert batch.inputs.shape == (300, 128, 2) and batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs[:, :, 0].unique().tolist() == list(range(68))
    assert batch.inputs[:, :, 1].unique().tolist() == list(range(69))
    assert batch.targets.unique().tolist() == [IGNORED, *range(64)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"needles": 0}, "paired_token: needles=0 is less than 1; give 1 or more"),
        ({"needles": "8"}, "paired_token: needles='8' is not of type int; give a value of that type"),
        ({"needles": True}, "paired_token: needles=True is not of type int; give a value of that type"),
        ({"needles": 65}, "paired_token: keys=64 is less than needles=65; give keys=65 or more"),
        ({"overwritten": 1.5}, "paired_token: overwritten=1.5 is not a share; give a number from 0 to 1"),
        ({"overwritten": float("nan")}, "paired_token: overwritten=nan is not a share; give a number from 0 to 1"),
        (
            {"overwritten": 0.5, "values": 1},
            "paired_token: values=1 leaves no other value to overwrite with; give 2 or more, or overwritten=0",
        ),
        (
            {"filler": "stabel"},
            "paired_token: filler='stabel' is not one of the choices; choose from stable, random, drifting, runs",
        ),
        (
            {"needles": 64, "overwritten": 1, "tokens": 143},
            "paired_token: tokens=143 does not hold 64 needles, 64 given again and 16 queries; give 144 or more",
        ),
    ],
)
def test_bad_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(RecallError) as error:
        PairedToken(**{"needles": 8, **fields})
    assert str(error.value) == message


def test_a_row_may_be_needles_and_queries_alone() -> None:
    task = PairedToken(64, overwritten=1, tokens=144)
    assert task.batch(2, stream(0, "train")).inputs[:, :128, 0].max() < 64
