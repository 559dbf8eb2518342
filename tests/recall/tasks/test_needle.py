"""RULER's needle tasks in a closed vocabulary: every digit asked stands in the row, in a needle of the key asked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_train.recall.tasks.errors import RecallError
from dla_train.recall.tasks.needle import ASK, DIGITS, FIRST_KEY, KINDS, MARK, SENTENCE, SEP, Needle
from dla_train.recall.tasks.streams import stream
from dla_train.recall.tasks.task import IGNORED
from tests.recall.tasks.bounds import within
from tests.recall.tasks.reading import rows_of

COUNTS = {  # needles, digits of a value, queries, values asked per query
    "niah_single_1": (1, 7, 1, 1),
    "niah_single_2": (1, 7, 1, 1),
    "niah_single_3": (1, 32, 1, 1),
    "niah_multikey_1": (4, 7, 1, 1),
    "niah_multiquery": (4, 7, 4, 1),
    "niah_multivalue": (4, 7, 1, 4),
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 80), st.integers(4, 40), st.integers(0, 5))
def test_every_row_read_token_by_token_asks_for_the_values_of_keys_that_were_given(
    kind: str, spare: int, keys: int, seed: int
) -> None:
    needles, digits, queries, values = COUNTS[kind]
    needed = needles * (2 + digits) + queries * (2 + values * (digits + 1) - 1)
    task = Needle(kind, needed + spare, keys, words=20)
    for inputs, targets in rows_of(task.batch(3, stream(seed, "train"))):
        assert len(inputs) == len(targets) == task.tokens
        first_word = FIRST_KEY + keys
        memory: dict[int, list[list[int]]] = {}
        position, words = 0, 0
        while inputs[position] != ASK:
            if inputs[position] == MARK:
                key, value = inputs[position + 1], inputs[position + 2 : position + 2 + digits]
                assert FIRST_KEY <= key < first_word and max(value) < DIGITS
                memory.setdefault(key, []).append(value)
                position += 2 + digits
            else:
                assert first_word <= inputs[position] < first_word + 20
                position, words = position + 1, words + 1
        assert sum(map(len, memory.values())) == needles and words == spare + 1
        expected, answers = [], []
        asked: list[int] = []
        for _ in range(queries):
            asked.append(inputs[position + 1])
            for number, value in enumerate(memory[asked[-1]]):
                expected += [ASK, asked[-1], *value] if number == 0 else [SEP, *value]
                answers += [IGNORED, *value] if number == 0 else value
                answers += [IGNORED]
            position += 2 + values * (digits + 1) - 1
        assert len(set(asked)) == queries
        tail = len(expected) - 1  # the last digit is asked and not read
        assert inputs[-tail:] == expected[:-1]
        assert targets[-tail:] == answers[:-1]
        assert set(targets[:-tail]) <= {IGNORED}


def test_the_sentence_is_rulers_and_goes_on_across_the_needle() -> None:
    text = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    words = text.lower().replace(".", "").split()
    names = list(dict.fromkeys(words))
    assert tuple(names.index(word) for word in words) == SENTENCE
    task = Needle("niah_single_1", tokens=100)
    for row in task.batch(20, stream(0, "train")).inputs:
        read = (row[row >= FIRST_KEY + 64] - FIRST_KEY - 64).tolist()
        assert len(read) == 83 and read == [SENTENCE[place % 19] for place in range(83)]


def test_an_essays_words_follow_zipfs_law() -> None:
    task = Needle("niah_single_2", tokens=512, words=50)
    tokens = task.batch(200, stream(0, "train")).inputs
    words = tokens[tokens >= FIRST_KEY + 64] - FIRST_KEY - 64
    total = sum(1 / rank for rank in range(1, 51))
    assert all(within(int((words == rank - 1).sum()), words.numel(), 1 / rank / total) for rank in range(1, 51))


def test_a_needle_lies_anywhere_and_its_digits_are_any() -> None:
    task = Needle("niah_single_2", tokens=30, words=20)  # 31 - 9 tokens of question and answer: 14 places of the needle
    inputs = task.batch(4000, stream(0, "train")).inputs
    places = (inputs == MARK).int().argmax(dim=1)
    assert all(within(int((places == place).sum()), 4000, 1 / 14) for place in range(14))
    last = inputs.gather(1, places[:, None] + 8)[:, 0]
    assert all(within(int((last == digit).sum()), 4000, 1 / 10) for digit in range(10))


def test_the_key_asked_is_any_of_those_given() -> None:
    batch = Needle("niah_multikey_1", tokens=64).batch(4000, stream(0, "train"))
    marks = (batch.inputs == MARK).nonzero()[:, 1].view(4000, 4)
    asked = batch.inputs.gather(1, (batch.inputs == ASK).int().argmax(dim=1, keepdim=True) + 1)
    order = (batch.inputs.gather(1, marks + 1) == asked).int().argmax(dim=1)
    assert all(within(int((order == place).sum()), 4000, 1 / 4) for place in range(4))


def test_kinds_share_their_ids() -> None:
    assert {Needle(kind).vocabulary for kind in KINDS} == {(19 + 64 + 256,)} and Needle("niah_single_1").answers == 16
    digits = Needle("niah_single_3").batch(100, stream(0, "train")).targets
    assert digits.unique().tolist() == [IGNORED, *range(16)]
    assert torch.equal(Needle("niah_single_2").batch(100, stream(0, "train")).targets.unique()[1:], torch.arange(10))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kind": "niah_single_4"},
            "needle: kind='niah_single_4' is not one of the choices; choose from niah_single_1, niah_single_2, "
            "niah_single_3, niah_multikey_1, niah_multiquery, niah_multivalue",
        ),
        (
            {"kind": "niah_multiquery", "keys": 3},
            "needle: keys=3 is less than the 4 of niah_multiquery; give 4 or more",
        ),
        ({"words": 14}, "needle: words=14 is less than 15; give 15 or more"),
        ({"tokens": 17}, "needle: tokens=17 does not hold niah_single_1 and a word; give 18 or more"),
    ],
)
def test_bad_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(RecallError) as error:
        Needle(**{"kind": "niah_single_1", **fields})
    assert str(error.value) == message
