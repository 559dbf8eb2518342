"""Every crossing, on 2 and 4 ranks, is the function of one process that holds the tensors of all ranks."""

import pytest
import torch
from torch import Tensor

from dla_train.parallel import regions
from dla_train.parallel.axes import Axis
from tests.parallel.ranks import Check, Outcomes, run_on_ranks
from tests.parallel.region_cases import CASES, LAYOUTS, PLANTS, SHAPE, expected, input_of, whole_loss
from tests.tolerances import assert_close

DTYPES = ("float64", "float32", "bfloat16")
CAUGHT = {
    "no sum": ("copy_to", "reduce_from", "total"),
    "no sum before the slice": ("gather_along 0", "reduce_scatter_along 1"),
    "own part repeated": ("gather_along 1", "reduce_scatter_along -1"),
    "nothing exchanged": ("exchange 1 2", "exchange 0 1"),
}
"""Which crossings a bug must be noticed in."""


def check(name: str, layout: str = "contiguous", dtype: str = "float64", plant: str = "") -> Check:
    return Check("cross", arguments={"name": name, "layout": layout, "dtype": dtype, "plant": plant})


CHECKS = [
    *(check(name, layout) for name in CASES for layout in LAYOUTS),
    *(check(name, dtype=dtype) for name in CASES for dtype in DTYPES[1:]),
    *(check(name, plant=plant) for plant, names in CAUGHT.items() for name in names),
    Check("imports_megatron"),
]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture(scope="module")
def outcomes(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_on_ranks("tests.parallel.region_cases", CHECKS, ranks, tmp_path_factory.mktemp("regions"))


def compare(found: list[dict[str, Tensor]], name: str, layout: str = "contiguous") -> None:
    """Fails where a rank's output, gradient, second derivative or input is not that of the whole."""
    for rank, (actual, wanted) in enumerate(zip(found, expected(name, len(found), layout), strict=True)):
        for key, value in actual.items():
            assert_close(f"{key} of rank {rank}", value, wanted[key], value.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_second_derivatives_are_those_of_the_whole_and_the_input_is_left_alone(
    outcomes: Outcomes, name: str, layout: str
) -> None:
    compare(outcomes.of(check(name, layout)), name, layout)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", CASES)
def test_every_float_type_is_carried_as_it_is(outcomes: Outcomes, name: str, dtype: str) -> None:
    found = outcomes.of(check(name, dtype=dtype))
    assert {value.dtype for of_rank in found for value in of_rank.values()} == {getattr(torch, dtype)}
    compare(found, name)


@pytest.mark.parametrize(("plant", "name"), [(plant, name) for plant, names in CAUGHT.items() for name in names])
def test_a_planted_bug_is_noticed(outcomes: Outcomes, plant: str, name: str) -> None:
    with pytest.raises(AssertionError, match="of rank"):
        compare(outcomes.of(check(name, plant=plant)), name)


def test_every_planted_bug_is_tried() -> None:
    assert CAUGHT.keys() == PLANTS.keys()


def test_data_parallel_ranks_do_not_import_megatron(outcomes: Outcomes) -> None:
    assert [found["megatron"] for found in outcomes.of(CHECKS[-1])] == [0.0] * len(outcomes.of(CHECKS[-1]))


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_whole_are_those_of_finite_differences(name: str) -> None:
    case = CASES[name]
    inputs = [input_of(case, rank).requires_grad_() for rank in range(1 if case.equal_inputs else 2)]

    def loss(*variables: Tensor) -> Tensor:
        return whole_loss(case, [*variables] * (2 if case.equal_inputs else 1), "contiguous")

    assert torch.autograd.gradcheck(loss, inputs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_one_rank_gets_its_input_back(name: str) -> None:
    x = input_of(CASES[name], 0)
    assert CASES[name].apply(x, Axis.single()) is x


def test_a_dim_that_does_not_divide_is_refused_before_communicating() -> None:
    with pytest.raises(ValueError, match=r"reduce_scatter_along: dim 1 of shape \[4, 8, 4\] has size 8, which 3 ranks"):
        regions.reduce_scatter_along(torch.zeros(SHAPE), Axis(rank=0, size=3), -2)


def test_an_exchange_that_does_not_divide_or_joins_what_it_splits_is_refused() -> None:
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="exchange: dim 2 .* has size 4, which 3 ranks do not divide"):
        regions.exchange(x, Axis(rank=0, size=3), -1, 0)
    with pytest.raises(ValueError, match="split_dim and join_dim are both 1"):
        regions.exchange(x, Axis.single(), 1, -2)


def test_a_dim_that_does_not_exist_is_refused() -> None:
    with pytest.raises(IndexError, match=r"dim 3 is not a dimension of shape \[4, 8, 4\]"):
        regions.gather_along(torch.zeros(SHAPE), Axis.single(), 3)


@pytest.mark.parametrize("name", CASES)
def test_a_planned_axis_does_not_reach_the_default_group(name: str) -> None:
    x = input_of(CASES[name], 0).requires_grad_()
    with pytest.raises(RuntimeError, match="axis of 2 rank.* has no process group"):
        CASES[name].apply(x, Axis(rank=0, size=2)).sum().backward()
