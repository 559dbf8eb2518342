"""The distribution a token is drawn from, by hand, and the draw."""

import pytest
import torch

from dla_train.generate.errors import GenerationError
from dla_train.generate.sampling import Sampling, distribution, draw

PLAIN = torch.tensor([[0.05, 0.5, 0.15, 0.3]])


def of(sampling, seen=None, logits=None):
    return distribution(PLAIN.log() if logits is None else logits, sampling, seen)[0].tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.05, 0.5, 0.15, 0.3]),
        (Sampling(temperature=0), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), [0.0025 / 0.365, 0.25 / 0.365, 0.0225 / 0.365, 0.09 / 0.365]),
        (Sampling(top_k=2), [0, 0.625, 0, 0.375]),
        (Sampling(top_k=9), [0.05, 0.5, 0.15, 0.3]),
        (Sampling(top_p=0.5), [0, 1, 0, 0]),
        (Sampling(top_p=0.51), [0, 0.625, 0, 0.375]),
        (Sampling(top_p=0.9), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
        # top_p counts what top_k and the temperature leave: 0.625 and 0.375
        (Sampling(top_k=2, top_p=0.6), [0, 1, 0, 0]),
        (Sampling(temperature=0.5, top_p=0.6), [0, 1, 0, 0]),
    ],
)
def test_filters_give_the_distribution_computed_by_hand(sampling, expected):
    assert of(sampling) == pytest.approx(expected, abs=1e-6)


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens_before_the_rest():
    logits, seen = torch.tensor([[2.0, -1.0, 1.5, 0.5]]), torch.tensor([[True, True, False, False]])
    expected = torch.tensor([1.0, -2.0, 1.5, 0.5])
    assert of(Sampling(repetition_penalty=2), seen, logits) == pytest.approx(expected.softmax(0).tolist())
    assert of(Sampling(repetition_penalty=2, temperature=0), seen, logits) == [0, 0, 1, 0]
    assert of(Sampling(repetition_penalty=2, temperature=0.5), seen, logits) == pytest.approx(
        (2 * expected).softmax(0).tolist()
    )


def test_rows_are_filtered_each_on_its_own():
    both = distribution(torch.stack([PLAIN[0].log(), PLAIN[0].flip(0).log()]), Sampling(top_k=2))
    assert both[0].tolist() == pytest.approx([0, 0.625, 0, 0.375]) and both[1].tolist() == both[0].flip(0).tolist()


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 1), (0.6249, 1), (0.6251, 3), (1 - 2**-53, 3)], ids=["least", "below", "above", "most"]
)
def test_a_draw_inverts_the_distribution_function_and_never_takes_what_was_filtered_out(uniform, token):
    kept = distribution(torch.cat([PLAIN, torch.full((1, 1), 1e-9)], 1).log(), Sampling(top_k=2))
    assert draw(kept, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_draws_have_the_frequencies_of_the_distribution():
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = draw(PLAIN.expand(20000, 4), uniform).bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, PLAIN[0], rtol=0, atol=0.012)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(GenerationError, match=f"{name}={value} must be"):
        Sampling(**{name: value})
