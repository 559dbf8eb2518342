"""The search: the same proposals after a restart, pruning, studies of other axes."""

import sys
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from dla_train.config import ConfigError
from dla_train.sweep.definition import SweepConfig
from dla_train.sweep.tpe import STARTUP_TRIALS, Study

TPE = ("sweep.sampler=tpe", "sweep.budget=9", "sweep.axes.optim.eps={low: 1e-9, high: 1e-5, log: true}")
Make = Callable[..., tuple[SweepConfig, list[str]]]


@pytest.fixture
def search(sweep: Make, tmp_path: Path) -> Callable[..., Study]:
    """search(..., folder="sweep") -> the study of tau and eps in tmp_path/folder, opened anew each time."""

    def make(*words: str, folder: str = "sweep") -> Study:
        (tmp_path / folder).mkdir(exist_ok=True)
        return Study(sweep(*TPE, f"sweep.folder={tmp_path}/{folder}", *words)[0])

    return make


def behind(study: Study, number: int, curve: dict[int, float]) -> bool:
    study.report(number, curve)
    return study.should_stop(number)


def value_of(values: dict[str, float]) -> float:
    return values["memory.tau"] + values["optim.eps"] * 1e4


def test_a_search_that_is_opened_anew_for_every_trial_proposes_what_one_in_one_go_proposes(search) -> None:
    straight, restarted = search(folder="a"), search(folder="b")
    for number in range(8):
        one, two = straight.ask(), restarted.ask()
        assert one == two and one.trial == number
        for study in (straight, restarted):
            study.tell(number, "finished", value_of(one.values))
        restarted = search(folder="b")
    assert restarted.settings() == straight.settings()
    assert len({setting.values["optim.eps"] for setting in straight.settings()}) == 8


def test_the_sampler_seed_changes_the_proposals_and_the_budget_ends_them(search) -> None:
    study = search("sweep.budget=2")
    asked = [study.ask(), study.ask()]
    assert study.ask() is None and study.settings() == asked
    assert search("sweep.sampler_seed=1", folder="other").ask() != asked[0]
    assert search("sweep.budget=3").ask() not in (None, *asked)


def test_a_proposal_that_a_kill_cut_in_half_is_given_up_and_costs_no_budget(search, tmp_path: Path) -> None:
    study = search("sweep.budget=1")
    there = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/sweep/study.db")
    there.ask().suggest_categorical("memory.tau", [0.5, 0.7])
    study = search("sweep.budget=1")
    assert study.settings() == [] and not study.is_open(0)
    assert study.ask().trial == 1


def test_what_lies_above_the_median_of_enough_others_is_stopped_after_the_grace(search) -> None:
    study = search("sweep.prune=true", "sweep.prune_after_steps=6")
    for number in range(STARTUP_TRIALS):
        study.ask()
        assert not behind(study, number, {4: 3.0, 8: 2.0})
        study.tell(number, "finished", 2.0)
    number = study.ask().trial
    assert not behind(study, number, {4: 9.0}), "within prune_after_steps"
    assert behind(study, number, {4: 9.0, 8: 2.1})
    study.tell(number, "pruned")
    better = search("sweep.prune=true", "sweep.prune_after_steps=6").ask().trial
    assert not behind(study, better, {4: 9.0, 8: 1.9})


def test_nothing_is_stopped_without_prune(search) -> None:
    study = search()
    for number in range(STARTUP_TRIALS):
        study.ask()
        behind(study, number, {8: 2.0})
        study.tell(number, "finished", 2.0)
    assert not behind(study, study.ask().trial, {8: 99.0})


def test_a_study_of_other_axes_is_refused(search) -> None:
    search().ask()
    with pytest.raises(ConfigError, match="sweep.axes.memory.tau is .* here and .* choose another sweep.folder"):
        search("sweep.axes.memory.tau=[0.5,0.9]")


def test_without_optuna_the_mend_is_named(search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs the package optuna; pip install 'dla-train\[sweep\]'"):
        search()
