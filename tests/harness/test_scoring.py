"""Log-likelihoods in padded batches against one row at a time in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_train.harness.scoring import Request, Score, batches, score
from tests.harness.conftest import KINDS, token_rows
from tests.tolerances import RELATIVE

LENGTHS = [1, 7, 33, 33, 12, 40, 2, 19]


def requests_of(lengths=LENGTHS):
    """Contexts and continuations of 1 to 3 tokens."""
    rows = token_rows([length + 1 + length % 3 for length in lengths])
    return [Request(row[:-1], row[-(1 + length % 3) :]) for row, length in zip(rows, lengths, strict=True)]


def alone(model, request):
    with torch.no_grad():
        logits = model(torch.tensor([request.inputs])).logits[0, -len(request.targets) :].double()
    targets = torch.tensor(request.targets)
    picked = logits.log_softmax(-1).gather(-1, targets[:, None])
    return Score(picked.sum().item(), bool((logits.argmax(-1) == targets).all()))


def scored(model, requests, batch_tokens):
    found = dict(pair for batch in score(model, requests, batch_tokens=batch_tokens) for pair in batch)
    return [found[index] for index in range(len(requests))]


@pytest.mark.parametrize(("backbone", "policy"), KINDS)
def test_scores_in_batches_of_1_and_of_8_are_those_of_each_row_alone(small, backbone, policy):
    model, requests = small(backbone, policy), requests_of()
    expected = [alone(model, request) for request in requests]
    for batch_tokens in (1, 8 * 45):
        for found, wanted in zip(scored(model, requests, batch_tokens), expected, strict=True):
            assert found.greedy == wanted.greedy
            limit = RELATIVE[torch.float32] * abs(wanted.log_likelihood)
            assert abs(found.log_likelihood - wanted.log_likelihood) <= limit


def test_a_continuation_is_greedy_only_if_every_token_is_the_likeliest(small):
    model = small("mamba2", "dla")
    inputs = token_rows([9])[0]

    def likeliest(*tokens):
        with torch.no_grad():
            return int(model(torch.tensor([tokens])).logits[0, -1].argmax())

    first = likeliest(*inputs)
    second, wrong = likeliest(*inputs, first), (first + 1) % 310
    right = Request((*inputs, first), (first, second))
    bad = Request((*inputs, first), (first, (second + 1) % 310))
    half = Request((*inputs, wrong), (wrong, likeliest(*inputs, wrong)))
    assert [found.greedy for found in scored(model, [right, bad, half], 100)] == [True, False, False]


def test_equal_inputs_are_computed_once(small):
    model, inputs = small("mamba2", "dla"), token_rows([20])[0]
    letters = [Request(inputs, (letter,)) for letter in (5, 6, 7)] + [Request(inputs, (*inputs[-2:], 9))]
    seen = []
    hook = model.register_forward_hook(lambda module, given, out: seen.append(tuple(given[0].shape)))
    found = scored(model, letters, 1000)
    hook.remove()
    assert seen == [(1, 20)]
    for one, request in zip(found, letters, strict=True):
        assert one.log_likelihood == pytest.approx(alone(model, request).log_likelihood, rel=RELATIVE[torch.float32])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_batches_hold_every_row_once_and_no_more_tokens_than_they_may(lengths, batch_tokens):
    rows = [(number,) * length for number, length in enumerate(sorted(lengths, reverse=True))]
    made = list(batches(rows, batch_tokens))
    assert [row for batch in made for row in batch] == rows
    assert all(len(batch) == 1 or len(batch) * len(batch[0]) <= batch_tokens for batch in made)
    assert all((len(batch) + 1) * len(batch[0]) > batch_tokens for batch in made[:-1])  # and none could hold one more
