"""The first number that is not finite is found where it arises: in a weight, in forward, in backward, or nowhere."""

import pytest
import torch
from torch import Tensor, nn

from dla_train.resilience.diagnosis import first_not_finite


class Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class Breaking(nn.Module):
    """Breaks as it is told."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.how == "forward":
            return x / 0.0
        return Overflow.apply(x) if self.how == "backward" else x


def model(how: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), Breaking(how), nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("how", "found"),
    [("", ""), ("forward", "forward of 1"), ("backward", "backward, first at the output of 1.linear")],
)
def test_the_module_is_named_where_it_begins(how: str, found: str) -> None:
    net = model(how)
    losses = [lambda: net(torch.zeros(2, 3)).square().sum(), lambda: net(torch.ones(2, 3)).square().sum()]
    assert first_not_finite(net, losses) == found
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_damaged_parameter_is_named_and_everything_is_computed_all_the_same() -> None:
    """Another rank, whose parameters are whole, computes it too, and would wait for this one."""
    net = model("")
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
        net[2].bias[0] = float("inf")
    computed = []

    def loss() -> Tensor:
        computed.append(1)
        return net(torch.ones(2, 3)).sum()

    assert first_not_finite(net, [loss, loss]) == "parameter 2.weight and 1 more"
    assert len(computed) == 2


def test_a_rank_whose_numbers_break_at_once_goes_back_as_far_as_one_whose_do_not() -> None:
    """Where the model is divided, other ranks' numbers may be finite, and their backward passes wait for this one's."""
    gone: dict[str, list[int]] = {"whole": [], "broken": []}
    for name, row in (("whole", 1.0), ("broken", float("nan"))):
        net = model("")
        net[0].register_full_backward_hook(lambda *_, name=name: gone[name].append(0))
        net[1].register_full_backward_hook(lambda *_, name=name: gone[name].append(1))
        found = first_not_finite(net, [lambda net=net, row=row: net(torch.full((2, 3), row, requires_grad=True)).sum()])
        assert found == ("" if name == "whole" else "forward of 0")
    assert gone["whole"] and gone["broken"] == gone["whole"]


def test_a_loss_that_breaks_behind_the_last_module_is_told() -> None:
    net = model("")
    assert first_not_finite(net, [lambda: net(torch.ones(2, 3)).sum() * float("nan")]) == "the loss"


def test_the_second_micro_batch_is_looked_at_too() -> None:
    net = model("")
    good = lambda: net(torch.ones(2, 3)).sum()  # noqa: E731
    bad = lambda: net(torch.full((2, 3), float("inf"))).sum()  # noqa: E731
    assert first_not_finite(net, [good, bad]) == "forward of 0"
