"""What a sweep may say, and the sentences after a mistake."""

import pytest

from dla_train.config import ConfigError
from dla_train.sweep.command import checked_points
from dla_train.sweep.definition import Range, read_sweep, shipped, sweep_axes
from tests.sweep.conftest import SWEPT


def test_words_of_the_sweep_and_of_its_runs_are_told_apart(sweep) -> None:
    found, overrides = sweep(
        "sweep.seeds=[3,4]", "sweep.axes.memory.capacity=[4,8]", "sweep.baselines.ll=['memory=log_linear']"
    )
    assert found.seeds == [3, 4] and found.name == "small" and overrides == list(SWEPT)
    assert sweep_axes(found) == {"memory.tau": (0.5, 0.7), "memory.capacity": (4, 8)}
    assert found.baselines == {"single": ["memory=single"], "ll": ["memory=log_linear"]}


def test_the_folder_follows_the_name() -> None:
    assert read_sweep(["sweep=tau_capacity", "sweep.name=mine"])[0].folder == "runs/sweeps/mine"


def test_a_range_is_for_random_and_tpe(sweep) -> None:
    axis = "sweep.axes.optim.eps={low: 1e-4, high: 1e-2, log: true}"
    found, _ = sweep(axis, "sweep.sampler=random", "sweep.budget=2")
    assert sweep_axes(found)["optim.eps"] == Range(1e-4, 1e-2, log=True)
    with pytest.raises(ConfigError, match=r"sweep\.axes\.optim\.eps is a range.*use random or tpe"):
        sweep(axis)


@pytest.mark.parametrize(
    "words, message",
    [
        (["sweep.sampler=grids"], "sweep.sampler=grids is not one of the choices"),
        (["sweep.objective=loss"], "sweep.objective=loss is not one of the choices"),
        (["sweep.parallell=2"], "did you mean sweep.parallel"),
        (["sweep.seeds=x"], "sweep.seeds"),
        (["sweep.seeds=[1,1]"], "each once"),
        (["sweep.seeds=[]"], "at least one seed"),
        (["sweep.seeds=1,2"], "several values"),
        (["sweep.baselines.b=[memory=single]"], "settings inside a value in quotes"),
        (["sweep.ranks=0"], "sweep.ranks=0 is below 1"),
        (["sweep.budget=3"], "not used by sweep.sampler=grid"),
        (["sweep.sampler=random"], "needs axes and sweep.budget"),
        (["sweep.prune=true"], "not used by sweep.sampler=grid"),
        (["sweep.prune_after_steps=3"], "needs sweep.prune=true"),
        (["sweep.sampler=tpe", "sweep.budget=2", "sweep.retry_failed=true"], "raise sweep.budget"),
        (["sweep.axes={}", "sweep.baselines={}"], "nothing to run"),
        (["sweep.axes.memory.taus=[1]"], "did you mean memory.tau"),
        (["sweep.axes.memory.tau=0.5"], "is no axis"),
        (["sweep.axes.memory.tau=[]"], "is no axis"),
        (["sweep.axes.memory.tau=[0.5,0.5]"], "names a value twice"),
        (["sweep.axes.memory.tau={low: 1, high: 0.5}"], "low < high"),
        (["sweep.axes.memory.tau={low: 0, high: 0.5, log: true}"], "low above 0"),
        (["sweep.axes.memory.capacity={low: 1.5, high: 4, integer: true}"], "whole bounds"),
        (["sweep.axes.memory.capacity={low: 1, high: 4, step: 2}"], "is no axis"),
        (["sweep.axes.seed=[0,1]"], "set sweep.seeds"),
        (["run_dir=x"], "set sweep.folder"),
        (["seed=3"], "set sweep.seeds"),
        (["memory.tau=0.4"], "swept over by sweep.axes.memory.tau"),
        (["report"], "is not a setting"),
        (["sweep.name=''"], "must not be empty"),
    ],
)
def test_a_mistake_names_the_key_and_the_mend(sweep, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(*words)


def test_an_unknown_sweep_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean tau_capacity"):
        read_sweep(["sweep=tau_capasity"])
    with pytest.raises(ConfigError, match="0 words sweep="):
        read_sweep(["experiment=quickstart"])


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_sweep_is_legal_with_the_quickstart(name: str) -> None:
    sweep, overrides = read_sweep([f"sweep={name}", "experiment=quickstart"])
    points, configs = checked_points(sweep, overrides)
    assert len(configs) == len(points) >= 1 and sweep.baselines
