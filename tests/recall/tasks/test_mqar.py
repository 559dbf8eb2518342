"""MQAR and its forgetting variant: rows as zoology describes them, and gaps with its power law."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_train.recall.tasks.errors import RecallError
from dla_train.recall.tasks.mqar import ForgettingMqar, Mqar
from dla_train.recall.tasks.streams import stream
from tests.recall.tasks.bounds import within
from tests.recall.tasks.reading import asked, last_writes, rows_of


@st.composite
def tasks(draw: st.DrawFn) -> Mqar:
    pairs = draw(st.integers(1, 24))
    updates = draw(st.integers(0, pairs))
    tokens = 4 * pairs + 2 * updates + 2 * draw(st.integers(0, 30))
    size = max(tokens + 1, 2 * pairs + 2) + draw(st.integers(0, 500))
    power, filled = draw(st.sampled_from([0, 0.01, 0.5, 1.0])), draw(st.booleans())
    fields = {"tokens": tokens, "vocab_size": size, "power_a": power, "random_non_queries": filled}
    return (
        ForgettingMqar(pairs=pairs, updates=updates, **fields) if draw(st.booleans()) else Mqar(pairs=pairs, **fields)
    )


@settings(max_examples=100, deadline=None)
@given(tasks(), st.integers(0, 5))
def test_every_row_read_token_by_token_answers_each_key_once_with_its_last_value(task: Mqar, seed: int) -> None:
    updates = getattr(task, "updates", 0)
    start = 2 * (task.pairs + updates)
    for inputs, targets in rows_of(task.batch(3, stream(seed, "train"))):
        assert len(inputs) == len(targets) == task.tokens
        keys, values = inputs[0:start:2], inputs[1:start:2]
        assert len(set(keys[: task.pairs])) == len(set(values[: task.pairs])) == task.pairs
        assert len(set(keys[task.pairs :])) == updates and set(keys[task.pairs :]) <= set(keys)
        assert all(
            1 <= key < task.vocab_size // 2 <= value < task.vocab_size for key, value in zip(keys, values, strict=True)
        )
        memory = last_writes(zip(keys, values, strict=True))
        queries = asked(targets)
        assert all(place >= start and place % 2 == 0 for place in queries)
        assert sorted(inputs[place] for place in queries) == sorted(memory)
        assert all(memory[inputs[place]] == targets[place] for place in queries)
        if not task.random_non_queries:
            assert all(inputs[place] == 0 for place in range(start, task.tokens) if place not in queries)


def gaps(task: Mqar, rows: int) -> list[tuple[int, ...]]:
    """g of each key, in the order the keys are given."""
    found = []
    for inputs, targets in rows_of(task.batch(rows, stream(0, "train"))):
        start = 2 * task.pairs
        place = {inputs[position]: (position - start) // 2 for position in asked(targets)}
        found.append(tuple(place[key] for key in inputs[0:start:2]))
    return found


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_gaps_are_drawn_by_the_power_law_one_key_after_the_other_without_replacement(power: float) -> None:
    """The chance of every ordered outcome, worked out by drawing one gap after the other."""
    rows = 20_000
    task = Mqar(pairs=2, tokens=12, power_a=power)
    weights = [(gap + 1) ** (power - 1) for gap in range(4)]
    found = Counter(gaps(task, rows))
    for first, second in itertools.permutations(range(4), 2):
        chance = weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
        assert within(found[first, second], rows, chance), (first, second)


def test_filler_is_any_id_and_keys_and_values_are_any_of_theirs() -> None:
    task = Mqar(pairs=4, tokens=64, vocab_size=70)
    batch = task.batch(4000, stream(0, "train"))
    keys, values = batch.inputs[:, 0:8:2], batch.inputs[:, 1:8:2]
    assert all(within(int((keys == key).sum(dim=1).sum()), 4000, 4 / 34) for key in range(1, 35))
    assert all(within(int((values == value).sum(dim=1).sum()), 4000, 4 / 35) for value in range(35, 70))
    filler = batch.inputs[:, 9::2]  # never a query
    assert all(within(int((filler == any_id).sum()), filler.numel(), 1 / 70) for any_id in range(70))


def test_the_keys_given_again_are_any_of_them_with_any_other_value() -> None:
    task = ForgettingMqar(pairs=4, updates=1, tokens=64, vocab_size=70)
    inputs = task.batch(4000, stream(0, "train")).inputs
    again = (inputs[:, 0:8:2] == inputs[:, 8:9]).int().argmax(dim=1)
    assert all(within(int((again == place).sum()), 4000, 1 / 4) for place in range(4))
    change = (inputs[:, 9] - inputs[:, 1:8:2].gather(1, again[:, None])[:, 0]) % 35
    assert change.min() == 1
    assert all(within(int((change == step).sum()), 4000, 1 / 34) for step in range(1, 35))


def test_the_published_settings_are_the_defaults() -> None:
    task = Mqar(pairs=4)
    assert (task.tokens, task.vocabulary, task.answers, task.power_a, task.random_non_queries) == (
        64,
        (8192,),
        8192,
        0.01,
        True,
    )
    batch = Mqar(pairs=64, tokens=256).batch(256, stream(0, "train"))
    assert batch.inputs.shape == batch.targets.shape == (256, 256)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.max() < 8192 and (batch.targets >= 0).sum(dim=1).tolist() == [64] * 256


MQAR = {"pairs": 4}
FORGETTING = {"pairs": 4, "updates": 2}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Mqar, {"tokens": 63}, "mqar: tokens=63 is odd, and pairs are two tokens; give 64"),
        (
            Mqar,
            {"tokens": 14},
            "mqar: tokens=14 does not hold what is given and pairs=4 queries, two tokens each; give 16 or more",
        ),
        (
            Mqar,
            {"pairs": 5, "tokens": 20, "vocab_size": 11},
            "mqar: vocab_size=11 has fewer than pairs=5 key ids; give 12 or more",
        ),
        (Mqar, {"vocab_size": 64}, "mqar: vocab_size=64 is not more than tokens=64; give 65 or more"),
        (Mqar, {"power_a": float("nan")}, "mqar: power_a=nan is out of range; give a number from 0 to 1"),
        (Mqar, {"random_non_queries": 1}, "mqar: random_non_queries=1 is not of type bool; give a value of that type"),
        (ForgettingMqar, {"updates": 5}, "forgetting_mqar: updates=5 is more than pairs=4; give 4 or less"),
        (
            ForgettingMqar,
            {"tokens": 18},
            "forgetting_mqar: tokens=18 does not hold what is given and pairs=4 queries, two tokens each; "
            "give 20 or more",
        ),
    ],
)
def test_bad_fields_are_named(kind: type, fields: dict, message: str) -> None:
    with pytest.raises(RecallError) as error:
        kind(**{**(MQAR if kind is Mqar else FORGETTING), **fields})
    assert str(error.value) == message
