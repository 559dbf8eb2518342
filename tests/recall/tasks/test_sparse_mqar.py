"""Pairs hidden in filler: each key is followed by its value, and what is asked was given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_train.recall.tasks.errors import RecallError
from dla_train.recall.tasks.filler import FILLERS
from dla_train.recall.tasks.sparse_mqar import SparseMqar
from dla_train.recall.tasks.streams import stream
from tests.recall.tasks.bounds import within
from tests.recall.tasks.reading import asked, rows_of


@st.composite
def tasks(draw: st.DrawFn) -> SparseMqar:
    pairs, queries = draw(st.integers(1, 33)), draw(st.integers(1, 20))
    return SparseMqar(
        pairs=pairs,
        tokens=2 * pairs + min(pairs, queries) + draw(st.integers(0, 200)),
        keys=pairs + draw(st.integers(0, 300)),
        values=draw(st.integers(1, 9)),
        queries=queries,
        filler=draw(st.sampled_from(FILLERS)),
        filler_types=draw(st.integers(1, 5)),
        run_tokens=draw(st.integers(1, 6)),
    )


@settings(max_examples=80, deadline=None)
@given(tasks(), st.integers(0, 5))
def test_every_row_read_token_by_token_answers_with_the_value_after_the_key(task: SparseMqar, seed: int) -> None:
    count, filler = min(task.pairs, task.queries), task.values + task.keys
    for tokens, targets in rows_of(task.batch(3, stream(seed, "train"))):
        assert len(tokens) == len(targets) == task.tokens
        assert asked(targets) == list(range(task.tokens - count, task.tokens))
        context, queries = tokens[:-count], tokens[-count:]
        memory, position = {}, 0
        while position < len(context):
            if context[position] < filler:
                key, value = context[position : position + 2]
                assert value < task.values <= key and key not in memory
                memory[key] = value
                position += 1
            position += 1
        assert len(memory) == task.pairs and len(set(queries)) == count
        assert [memory[key] for key in queries] == targets[-count:]


def test_runs_of_filler_have_four_tokens_not_counting_pairs() -> None:
    task = SparseMqar(pairs=32, filler_types=50)
    changes: list[int] = []
    for tokens in task.batch(50, stream(0, "train")).inputs[:, :-16]:
        changed = tokens[tokens >= 128].diff().nonzero().flatten() + 1
        changes += changed.tolist()
    assert {place % 4 for place in changes} == {0}
    assert len(changes) > 50 * 100 * 0.9  # of 108 runs of a row, all but one in fifty differ from the one before


def test_pairs_lie_anywhere_and_any_is_asked() -> None:
    tokens = SparseMqar(pairs=1, tokens=12).batch(5000, stream(0, "train")).inputs
    places = ((tokens >= 64) & (tokens < 128))[:, :11].int().argmax(dim=1)
    assert all(within(int((places == place).sum()), 5000, 1 / 10) for place in range(10))
    batch = SparseMqar(pairs=4, queries=2, tokens=10).batch(5000, stream(0, "train"))
    order = (batch.inputs[:, 8:, None] == batch.inputs[:, None, 0:8:2]).int().argmax(dim=2)
    assert all(within(int((order[:, query] == pair).sum()), 5000, 1 / 4) for query in (0, 1) for pair in range(4))


def test_the_documented_ids_are_used_and_no_others() -> None:
    task = SparseMqar(pairs=32)
    batch = task.batch(300, stream(0, "train"))
    assert task.vocabulary == (132,) and task.answers == 64
    assert batch.inputs.unique().tolist() == list(range(132))
    assert torch.equal(batch.targets.unique(), torch.tensor([-100, *range(64)]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairs": 65}, "sparse_mqar: keys=64 is less than pairs=65; give keys=65 or more"),
        ({"tokens": 23}, "sparse_mqar: tokens=23 does not hold 8 pairs and 8 queries; give 24 or more"),
        ({"run_tokens": 0}, "sparse_mqar: run_tokens=0 is less than 1; give 1 or more"),
        (
            {"filler": ""},
            "sparse_mqar: filler='' is not one of the choices; choose from stable, random, drifting, runs",
        ),
    ],
)
def test_bad_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(RecallError) as error:
        SparseMqar(**{"pairs": 8, **fields})
    assert str(error.value) == message
