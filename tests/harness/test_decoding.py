"""Greedy answers of unequal rows against each row alone, by whole forwards without any cache."""

import pytest
import torch

from dla_train.harness.decoding import answers
from tests.harness.conftest import KINDS, token_rows

LENGTHS = [5, 23, 23, 1, 40, 11, 23]


def alone(model, prompt, new_tokens, done=lambda tokens: False):
    made = []
    while len(made) < new_tokens and not (made and done(made)):
        with torch.no_grad():
            made.append(int(model(torch.tensor([[*prompt, *made]])).logits[0, -1].argmax()))
    return made


def answered(model, prompts, new_tokens, done=lambda tokens: False, **bounds):
    found = dict(pair for batch in answers(model, prompts, new_tokens, done, **bounds) for pair in batch)
    return [found[index] for index in range(len(prompts))]


@pytest.mark.parametrize(("backbone", "policy"), KINDS)
def test_answers_are_those_of_whole_forwards_at_any_batch_size(small, backbone, policy):
    model, prompts = small(backbone, policy), token_rows(LENGTHS)
    expected = [alone(model, prompt, 6) for prompt in prompts]
    assert len({tuple(one) for one in expected}) > 4  # rows differ, so that a mixed-up row shows
    for rows in (1, 3, 8):
        assert answered(model, prompts, 6, rows=rows) == expected


@pytest.mark.parametrize(("backbone", "policy"), KINDS)
def test_rows_that_are_done_leave_and_the_others_go_on_unchanged(small, backbone, policy):
    model, prompts = small(backbone, policy), token_rows(LENGTHS, seed=3)
    asked = []

    def done(tokens):
        asked.append(len(tokens))
        return sum(tokens) % 5 == 0

    expected = [alone(model, prompt, 12, lambda tokens: sum(tokens) % 5 == 0) for prompt in prompts]
    assert len({len(one) for one in expected}) > 1  # some end early, at different times
    steps = []
    step = model.step
    model.step = lambda tokens, caches: steps.append(len(tokens)) or step(tokens, caches)
    assert answered(model, prompts, 12, done, rows=8) == expected
    assert min(steps) < len(prompts) / 2  # rows did leave
    assert len(asked) <= sum(map(len, expected))  # once a token


def test_a_last_token_costs_no_step(small):
    model = small("mamba2", "dla")
    model.step = lambda tokens, caches: pytest.fail("a step whose logits nobody reads")
    assert [len(one) for one in answered(model, token_rows([4, 9]), 1, rows=2)] == [1, 1]
