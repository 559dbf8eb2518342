"""Axes of a run: who is on them, who makes them and who ends them."""

import pytest
import torch
import torch.distributed as dist

from dla_train.config import ConfigError
from dla_train.parallel.axes import Axes, Axis
from dla_train.parallel.mesh import Mesh, store_of_this_start
from tests.parallel.mesh_cases import NAMES, config
from tests.parallel.ranks import Check, Outcomes, run_on_ranks

LAYOUTS = {
    (1, 1): {"data": [[0, 1, 2, 3]], "batch": [[0, 1, 2, 3]]},
    (2, 1): {"tensor": [[0, 1], [2, 3]], "data": [[0, 2], [1, 3]], "batch": [[0, 2], [1, 3]]},
    (1, 2): {"context": [[0, 1], [2, 3]], "data": [[0, 2], [1, 3]], "batch": [[0, 1, 2, 3]]},
    (2, 2): {"tensor": [[0, 1], [2, 3]], "context": [[0, 2], [1, 3]], "batch": [[0, 2], [1, 3]]},
    (4, 1): {"tensor": [[0, 1, 2, 3]]},
    (1, 4): {"context": [[0, 1, 2, 3]], "batch": [[0, 1, 2, 3]]},
}
"""(tensor, context) of 4 processes -> the groups along each axis; an axis that is not named has one rank."""
PLACES = {layout: Check("members", tensor=layout[0], context=layout[1], sequence=layout[0] > 1) for layout in LAYOUTS}
OTHERS = [Check(name) for name in ("several_meshes", "nested", "indivisible", "group_of_one")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_on_ranks("tests.parallel.mesh_cases", [*PLACES.values(), *OTHERS], 4, tmp_path_factory.mktemp("mesh"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_axes_hold_the_processes_of_the_layout_in_order(outcomes: Outcomes, layout: tuple[int, int]) -> None:
    for rank, found in enumerate(outcomes.of(PLACES[layout])):
        assert found["sequence"] == (layout[0] > 1)
        for name in NAMES:
            (expected,) = [group for group in LAYOUTS[layout].get(name, [[rank]]) if rank in group]
            assert found[name].tolist() == expected, (name, rank)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planned_axes_stand_where_started_ones_do(outcomes: Outcomes, layout: tuple[int, int]) -> None:
    tensor, context = layout
    for rank, found in enumerate(outcomes.of(PLACES[layout])):
        planned = Axes.planned(tensor=tensor, context=context, data=4 // (tensor * context), rank=rank)
        for name in NAMES:
            axis: Axis = getattr(planned, name)
            assert found[f"{name} place"].tolist() == [axis.rank, axis.size], (name, rank)


def test_meshes_of_several_layouts_follow_each_other_and_leave_nothing(outcomes: Outcomes) -> None:
    for rank, found in enumerate(outcomes.of(OTHERS[0])):
        # data rank and size, tensor, context, sequence, ones summed over batch, tensor and all
        assert found["2 1"].tolist() == [rank // 2, 2, 2, 1, 1, 2, 2, 4]
        assert found["1 2"].tolist() == [rank // 2, 2, 1, 2, 0, 4, 1, 4]
        assert found["2 2"].tolist() == [0, 1, 2, 2, 1, 2, 2, 4]
        assert found["4 1"].tolist() == [0, 1, 4, 1, 1, 1, 4, 4]
        assert found["1 1"].tolist() == [rank, 4, 1, 1, 0, 4, 1, 4]
        assert found["threads 2"] == found["threads 0"]
        assert found["process group"] == 1


def test_a_mesh_uses_groups_of_its_layout_that_exist_and_leaves_them(outcomes: Outcomes) -> None:
    for found in outcomes.of(OTHERS[1]):
        assert found["same group"] == 1
        assert found["alive"].item() == 2
        assert found["undivided"] == 4


def test_a_mesh_of_another_layout_is_refused_while_groups_exist(outcomes: Outcomes) -> None:
    for found in outcomes.of(OTHERS[1]):
        assert found["refused"] == (
            "parallel.tensor=1 and parallel.context=2 were asked for while groups of tensor=2 and context=1 exist; "
            "leave the mesh that made them first"
        )


def test_a_layout_that_does_not_divide_the_processes_is_refused(outcomes: Outcomes) -> None:
    for found in outcomes.of(OTHERS[2]):
        assert found["refused"] == (
            "parallel.tensor=3 x parallel.context=2 does not divide the 4 processes of this run; start a multiple of "
            "6, or choose a product from 1, 2 or 4"
        )


def test_ending_axes_without_groups_leaves_the_processes_together(outcomes: Outcomes) -> None:
    assert [found["together"] for found in outcomes.of(OTHERS[3])] == [4.0] * 4


def test_one_process_stands_alone_on_every_axis() -> None:
    with Mesh.start(config(1, 1)) as mesh:
        assert mesh.axes == Axes.single() and not mesh.owns_axes
        assert (mesh.data_rank, mesh.data_size) == (0, 1)
        assert mesh.sum(torch.ones(2), mesh.axes.batch).tolist() == [1, 1]
    assert not dist.is_initialized()


def test_a_mesh_that_cannot_be_made_leaves_no_process_group() -> None:
    with pytest.raises(ConfigError, match=r"parallel.tensor=2 x parallel.context=1 does not divide the 1 processes"):
        Mesh.start(config(2, 1))
    assert not dist.is_initialized()


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (-1, 2), (0, 0)])
def test_a_rank_outside_its_axis_is_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"rank={rank} is not on an axis of size={size}"):
        Axis(rank, size)


def test_axes_whose_batch_is_not_data_times_context_are_refused() -> None:
    with pytest.raises(ValueError, match="batch has 2 ranks, but data x context has 2 x 2"):
        Axes(data=Axis(0, 2), tensor=Axis.single(), context=Axis(0, 2), batch=Axis(0, 2))


def test_a_planned_rank_outside_its_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=8 is not one of the 2 x 2 x 2 ranks of the layout"):
        Axes.planned(tensor=2, context=2, data=2, rank=8)


@pytest.mark.parametrize(("kept", "meet"), [("False", True), ("True", False)])
def test_counts_of_restarts_tell_starts_apart_only_where_torchrun_keeps_its_store(
    kept: str, meet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a store that it keeps lie the addresses of ranks that ended; machines of one start may have other counts."""
    store = dist.HashStore()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", kept)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    store_of_this_start(store).set("rank 0", "address")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert store_of_this_start(store).check(["rank 0"]) == meet
