"""A vocabulary divided over ranks looks up and costs what a whole one does."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dla_train.data.packing import IGNORED_TARGET
from dla_train.models.loss import next_token_loss
from dla_train.parallel.axes import Axis
from dla_train.parallel.vocab import IGNORED, embed, padded_vocab, real_rows, vocab_parallel_loss
from tests.parallel.ranks import Check, Outcomes, run_on_ranks
from tests.parallel.vocab_cases import BATCH, LOSS_WEIGHTS, TIME, VOCAB, WIDTH, logits, normal, targets, token_ids
from tests.tolerances import assert_close

LOOKUPS = {
    (scatter, dtype): Check("lookup", arguments={"scatter_time": scatter, "dtype": dtype})
    for scatter in (False, True)
    for dtype in ("float32", "bfloat16")
}
LOSSES = {
    (kind, z_loss): Check("loss", arguments={"kind": kind, "z_loss": z_loss})
    for kind in ("float64", "float32", "bfloat16", "huge")
    for z_loss in (0.0, 1e-2)
}
OUTSIDE = {token: Check("outside", arguments={"token": token}) for token in (VOCAB, 511, 512, -1)}
NOT_A_NUMBER = Check("loss_of_nan")


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    checks = [*LOOKUPS.values(), *LOSSES.values(), *OUTSIDE.values(), NOT_A_NUMBER]
    return run_on_ranks("tests.parallel.vocab_cases", checks, request.param, tmp_path_factory.mktemp("vocab"))


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """Every rank's part of a gradient over the vocabulary; fails where padding has one."""
    whole = torch.cat(parts, dim)
    assert whole.shape[dim] == padded_vocab(VOCAB, len(parts))
    real, padding = whole.split([VOCAB, whole.shape[dim] - VOCAB], dim)
    assert not padding.any()
    return real


@pytest.mark.parametrize(("scatter", "dtype"), LOOKUPS)
def test_a_lookup_finds_the_rows_of_the_whole_embedding_bit_for_bit(
    outcomes: Outcomes, scatter: bool, dtype: str
) -> None:
    found = outcomes.of(LOOKUPS[scatter, dtype])
    weight = normal(VOCAB, WIDTH, seed=0).float().requires_grad_()
    expected = F.embedding(token_ids(1), weight).to(getattr(torch, dtype))
    (expected * normal(BATCH, TIME, WIDTH, seed=3).to(expected.dtype)).sum().backward()
    outputs = [of_rank["output"] for of_rank in found]
    for output in [torch.cat(outputs, 1)] if scatter else outputs:
        assert torch.equal(output, expected)
    assert_close("gradient", joined([of_rank["gradient"] for of_rank in found], 0), weight.grad)


@pytest.mark.parametrize(("kind", "z_loss"), LOSSES)
def test_sums_and_gradients_of_the_loss_are_those_of_whole_logits(outcomes: Outcomes, kind: str, z_loss: float) -> None:
    found = outcomes.of(LOSSES[kind, z_loss])
    whole = logits(kind).requires_grad_()
    nats, partition, count = next_token_loss(whole, targets(), z_loss)
    (LOSS_WEIGHTS[0] * nats + LOSS_WEIGHTS[1] * partition).backward()
    for rank, of_rank in enumerate(found):
        assert_close(f"sums of rank {rank}", of_rank["sums"], torch.stack([nats, partition, count]).detach())
        assert torch.equal(of_rank["sums"], found[0]["sums"])
    assert_close("gradient", joined([of_rank["gradient"] for of_rank in found], 2), whole.grad)
    assert bool(partition) == bool(z_loss)


@pytest.mark.parametrize("token", OUTSIDE)
def test_a_token_outside_the_vocabulary_is_an_error_on_every_rank(outcomes: Outcomes, token: int) -> None:
    for errors in outcomes.of(OUTSIDE[token]):
        assert "out of range" in errors["lookup"]
        assert "out of bounds" in errors["loss"]


def test_a_logit_that_is_not_a_number_makes_the_loss_of_every_rank_one(outcomes: Outcomes) -> None:
    assert not any(found["nats"] == found["nats"] for found in outcomes.of(NOT_A_NUMBER))


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_gradient_of_the_loss_is_that_of_finite_differences(z_loss: float) -> None:
    scores = normal(2, 5, 7, seed=0).requires_grad_()
    wanted = torch.tensor([[0, 6, IGNORED, 3, 3], [IGNORED, 1, 2, 5, 0]])

    def value(x: Tensor) -> Tensor:
        nats, partition, _ = vocab_parallel_loss(x, wanted, Axis.single(), 7, z_loss)
        return LOSS_WEIGHTS[0] * nats + LOSS_WEIGHTS[1] * partition

    assert torch.autograd.gradcheck(value, scores, rtol=1e-7, atol=1e-8)


def test_a_loss_without_targets_is_zero_and_has_no_gradient() -> None:
    scores = torch.randn(1, 2, 7, requires_grad=True)
    nats, partition, count = vocab_parallel_loss(scores, torch.full((1, 2), IGNORED), Axis.single(), 7, 0.1)
    (nats + partition).backward()
    assert nats.item() == partition.item() == count.item() == 0
    assert not scores.grad.any()


def test_the_loss_keeps_no_wider_copy_of_its_logits() -> None:
    scores = torch.randn(4, 64, 1000, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        vocab_parallel_loss(scores, torch.zeros(4, 64, dtype=torch.int64), Axis.single(), 1000, 1e-4)
    beside = sum(x.nbytes for x in kept if x.untyped_storage().data_ptr() != scores.untyped_storage().data_ptr())
    assert any(x.untyped_storage().data_ptr() == scores.untyped_storage().data_ptr() for x in kept)
    assert beside <= 4 * 64 * 16


@pytest.mark.parametrize(
    ("vocab_size", "ranks", "rows"), [(320, 1, 320), (32000, 1, 32000), (32000, 8, 32768), (300, 2, 512), (512, 4, 512)]
)
def test_rows_are_padded_to_a_multiple_of_128_on_each_of_several_ranks(vocab_size: int, ranks: int, rows: int) -> None:
    assert padded_vocab(vocab_size, ranks) == rows
    assert padded_vocab(vocab_size, ranks, multiple=1) - vocab_size in range(ranks)


def test_padding_begins_behind_the_last_real_row() -> None:
    assert [real_rows(128, Axis(rank, 4), VOCAB) for rank in range(4)] == [(0, 128), (128, 128), (256, 44), (384, 0)]


def test_too_few_rows_for_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="100 rows on each of 2 ranks do not hold vocab_size=300; give each 256"):
        embed(token_ids(1), torch.zeros(100, WIDTH), Axis(0, 2), VOCAB)
    with pytest.raises(ValueError, match="299 rows on each of 1 ranks do not hold vocab_size=300; give each 300"):
        vocab_parallel_loss(torch.zeros(BATCH, TIME, 299), targets(), Axis.single(), VOCAB)


def test_every_part_of_the_code_ignores_the_same_target() -> None:
    assert IGNORED == IGNORED_TARGET
