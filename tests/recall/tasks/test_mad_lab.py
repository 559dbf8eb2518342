"""MAD-lab's noisy recall and selective copying: rows as it describes them, in the proportions it gives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_train.recall.tasks.errors import RecallError
from dla_train.recall.tasks.noisy_recall import NoisyRecall
from dla_train.recall.tasks.selective_copying import SelectiveCopying
from dla_train.recall.tasks.streams import stream
from dla_train.recall.tasks.task import IGNORED
from tests.recall.tasks.bounds import within
from tests.recall.tasks.reading import rows_of


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(2, 20), st.integers(1, 9), st.sampled_from([0, 0.2, 0.95]), st.integers(0, 5))
def test_keys_given_before_ask_for_their_value_and_nothing_else_does(
    slots: int, free: int, noises: int, noise: float, seed: int
) -> None:
    task = NoisyRecall(slots, free + noises, noises, noise)
    for tokens, targets in rows_of(task.batch(4, stream(seed, "train"))):
        assert len(tokens) == len(targets) == 2 * slots - 1 == task.tokens
        memory: dict[int, int] = {}
        for position in range(0, 2 * slots - 2, 2):
            key, value = tokens[position : position + 2]
            assert targets[position + 1] == IGNORED
            if key >= free:
                assert value >= free and targets[position] == IGNORED
                continue
            assert key < free // 2 <= value < free
            assert targets[position] == memory.get(key, IGNORED)
            assert memory.setdefault(key, value) == value
        assert targets[-1] == memory[tokens[-1]]


def test_noise_keys_and_values_come_in_their_proportions() -> None:
    task = NoisyRecall()
    assert (task.tokens, task.vocabulary, task.answers) == (127, (32,), 32)
    tokens = task.batch(2000, stream(0, "train")).inputs
    keys, values = tokens[:, 0:126:2], tokens[:, 1:126:2]
    kept = 1 / 63  # the slot that is never noise
    for slot in range(63):
        assert within(int((keys[:, slot] >= 16).sum()), 2000, 0.2 * (1 - kept))
    first = keys[:, 0]
    assert all(within(int((first == key).sum()), 2000, (1 - 0.2 * (1 - kept)) / 8) for key in range(8))
    assert all(within(int((values[:, 0] == value).sum()), 2000, (1 - 0.2 * (1 - kept)) / 8) for value in range(8, 16))
    noise = torch.cat([keys[keys >= 16], values[values >= 16]])
    assert all(within(int((noise == token).sum()), noise.numel(), 1 / 16) for token in range(16, 32))


def test_the_last_key_is_any_of_those_given_however_often_each_was() -> None:
    task = NoisyRecall(slots=5, vocab_size=4, noise_vocab_size=0, noise=0)
    tokens = task.batch(20_000, stream(0, "train")).inputs
    often = (tokens[:, 0:8:2] == 0).sum(dim=1)
    last = tokens[often == 3, -1]  # key 0 three times, key 1 once
    assert within(int((last == 0).sum()), last.numel(), 1 / 2)


def test_every_token_asks_for_the_next_one_where_that_is_trained() -> None:
    scored = NoisyRecall(slots=6).batch(5, stream(0, "train"))
    trained = NoisyRecall(slots=6, next_token=True).batch(5, stream(0, "train"))
    assert torch.equal(scored.inputs, trained.inputs)
    assert torch.equal(trained.targets[:, :-1], trained.inputs[:, 1:])
    asked = scored.targets != IGNORED
    assert torch.equal(trained.targets[asked], scored.targets[asked])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 60), st.integers(3, 40), st.integers(0, 5))
def test_the_tokens_that_are_no_blanks_are_asked_in_their_order(copied: int, blanks: int, size: int, seed: int) -> None:
    task = SelectiveCopying(copied, 2 * copied + 1 + blanks, size)
    for tokens, targets in rows_of(task.batch(4, stream(seed, "train"))):
        start = copied + blanks
        assert len(tokens) == len(targets) == task.tokens and tokens[start] == size - 1
        assert [token for token in tokens[:start] if token != size - 2] == targets[start + 1 :]
        assert tokens[start - 1] < size - 2, "a blank follows the last token"
        assert tokens[start + 1 :] == [size - 2] * copied and set(targets[: start + 1]) == {IGNORED}


def test_every_blank_precedes_each_token_with_the_same_chance() -> None:
    """The place of a token is binomial: how many of all blanks precede it or one before it."""
    rows, copied, blanks = 20_000, 3, 5
    tokens = SelectiveCopying(copied, 2 * copied + 1 + blanks).batch(rows, stream(0, "train")).inputs
    places = (tokens[:, : copied + blanks] < 14).nonzero()[:, 1].view(rows, copied)
    for index in range(copied):
        chance = (index + 1) / copied
        for before in range(blanks + 1):
            expected = math.comb(blanks, before) * chance**before * (1 - chance) ** (blanks - before)
            assert within(int((places[:, index] == before + index).sum()), rows, expected)


def test_copied_tokens_are_any_but_the_last_two_and_the_published_settings_are_the_defaults() -> None:
    task = SelectiveCopying()
    assert (task.copied, task.tokens, task.vocabulary, task.answers) == (16, 256, (16,), 16)
    first = task.batch(5000, stream(0, "train")).targets[:, -16]
    assert all(within(int((first == token).sum()), 5000, 1 / 14) for token in range(14))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (NoisyRecall, {"slots": 1}, "noisy_recall: slots=1 is less than 2; give 2 or more"),
        (
            NoisyRecall,
            {"vocab_size": 17},
            "noisy_recall: vocab_size=17 leaves no keys and values besides noise_vocab_size=16; give 18 or more",
        ),
        (NoisyRecall, {"noise": 1}, "noisy_recall: noise=1 is not a chance below 1; give 0 or more, less than 1"),
        (
            NoisyRecall,
            {"noise_vocab_size": 0},
            "noisy_recall: noise_vocab_size=0 has no ids for noise=0.2; give 1 or more, or noise=0",
        ),
        (
            SelectiveCopying,
            {"tokens": 33},
            "selective_copying: tokens=33 does not hold copied=16 twice, a blank and the copy token; give 34 or more",
        ),
        (SelectiveCopying, {"vocab_size": 2}, "selective_copying: vocab_size=2 is less than 3; give 3 or more"),
    ],
)
def test_bad_fields_are_named(kind: type, fields: dict, message: str) -> None:
    with pytest.raises(RecallError) as error:
        kind(**fields)
    assert str(error.value) == message
