"""The loss is a sum over counted targets, the same however a batch is divided."""

import math

import torch

from dla_train.models import next_token_loss


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    nats, partition, count = next_token_loss(torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64))
    assert math.isclose(nats.item(), 6 * math.log(7), rel_tol=1e-6)
    assert partition.item() == 0 and count.item() == 6


def test_ignored_targets_count_nothing():
    logits, targets = torch.randn(1, 5, 7), torch.tensor([[1, -100, 2, -100, 3]])
    kept = next_token_loss(logits[:, ::2], targets[:, ::2], 0.1)
    for whole, part in zip(next_token_loss(logits, targets, 0.1), kept, strict=True):
        torch.testing.assert_close(whole, part)


def test_a_batch_without_targets_gives_zero_and_a_zero_gradient():
    logits = torch.randn(1, 2, 7, requires_grad=True)
    nats, partition, count = next_token_loss(logits, torch.full((1, 2), -100), 0.1)
    (nats + partition).backward()
    assert nats.item() == partition.item() == count.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_z_loss_is_the_weighted_square_of_the_log_partition():
    logits, targets = torch.randn(3, 7), torch.tensor([0, 1, -100])
    expected = 0.25 * (logits[:2].exp().sum(-1).log() ** 2).sum()
    torch.testing.assert_close(next_token_loss(logits, targets, 0.25)[1], expected)


def test_sums_of_parts_equal_the_whole():
    logits, targets = torch.randn(4, 3, 7, dtype=torch.float64), torch.randint(0, 7, (4, 3))
    parts = [next_token_loss(x, y, 0.1) for x, y in zip(logits.split(1), targets.split(1), strict=True)]
    for whole, pieces in zip(next_token_loss(logits, targets, 0.1), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(whole, sum(pieces))


def test_bfloat16_logits_are_summed_in_float32():
    nats, _, _ = next_token_loss(torch.randn(3, 7).bfloat16(), torch.tensor([1, 2, 3]))
    assert nats.dtype == torch.float32
