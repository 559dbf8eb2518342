"""Points: what their runs are told, which are legal, what a folder may hold."""

import json
import shlex
from pathlib import Path

import pytest

from dla_train.config import ConfigError
from dla_train.hydra_app import compose
from dla_train.run_process import quoted
from dla_train.sweep import points as points_module
from dla_train.sweep.command import checked_points
from dla_train.sweep.points import (
    Setting,
    check_folder,
    check_points,
    command_line,
    points_of,
    read_points,
    setting_of,
    write_point,
)


def test_every_setting_and_baseline_has_every_seed_and_seeds_come_last(sweep) -> None:
    points, _ = checked_points(*sweep("sweep.seeds=[0,1]"))
    names = ["single", "tau_0.5", "tau_0.7"]
    assert [point.name for point in points] == [f"{name}-seed_{seed}" for seed in (0, 1) for name in names]


def test_points_of_one_seed_differ_in_what_is_swept_alone(sweep) -> None:
    points, configs = checked_points(*sweep())
    single, low, high = (configs[point.name] for point in points)
    assert (low.memory.tau, high.memory.tau, single.memory.policy) == (0.5, 0.7, "single")
    assert low.seed == high.seed == single.seed == 0
    high.memory.tau, high.name, high.run_dir = low.memory.tau, low.name, low.run_dir
    assert high == low
    single.memory, single.name, single.run_dir = low.memory, low.name, low.run_dir
    assert single == low


def test_the_command_line_overrides_the_sweeps_settings_and_baselines_override_both(sweep) -> None:
    points, configs = checked_points(*sweep("memory=dla_oldest"))
    assert [configs[point.name].memory.capacity_rule for point in points] == ["mass", "oldest", "oldest"]
    assert [configs[point.name].memory.policy for point in points] == ["single", "dla", "dla"]
    assert "optim.beta2=0.9" not in checked_points(*sweep("sweep.settings=['optim.beta2=0.9']"))[0][0].overrides
    assert all(sum(word.startswith("memory=") for word in point.overrides) == 1 for point in points)


def test_all_illegal_points_are_listed_before_anything_starts(sweep, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as found:
        checked_points(*sweep("sweep.axes.memory.tau=[0.5,7,9]"))
    message = str(found.value)
    assert "2 of 4 points are illegal, so nothing is started" in message
    assert "tau_7-seed_0: memory.tau=7" in message and "tau_9-seed_0: memory.tau=9" in message
    assert not (tmp_path / "sweep").exists()


def test_a_search_is_checked_at_the_ends_of_its_axes(sweep) -> None:
    words = ["sweep.sampler=tpe", "sweep.budget=3", "sweep.axes.memory.tau={low: 0.5, high: 9.0}"]
    with pytest.raises(ConfigError, match="tau_9.0-seed_0: memory.tau=9.0 lies outside"):
        checked_points(*sweep(*words))


def test_a_point_without_validation_has_no_objective(sweep) -> None:
    with pytest.raises(ConfigError, match="leaves sweep.objective=validation_loss without a value"):
        checked_points(*sweep("train.validation_batches=0", "train.validation_interval_steps=0"))


def test_axes_with_one_leaf_are_named_in_full(sweep) -> None:
    found, _ = sweep()
    setting = setting_of(found, {"memory.name": 1, "model.name": "b c"}, trial=7)
    assert setting.name == "trial_007-memory.name_1-model.name_b_c"
    assert setting_of(found, {"parallel.sequence": False, "x.y": None}).overrides == (
        "parallel.sequence=false",
        "x.y=null",
    )


def test_two_settings_of_one_name_are_an_error(sweep) -> None:
    found, overrides = sweep()
    with pytest.raises(ConfigError, match="two settings of the sweep are called a"):
        points_of(found, overrides, [Setting("a", {}, ()), Setting("a", {}, ("x=1",))])


def test_a_folder_takes_more_points_and_no_other_ones(sweep) -> None:
    one, overrides = sweep()
    folder = Path(one.folder)
    points, configs = checked_points(one, overrides)
    for point in points:
        write_point(folder, point, configs[point.name])
    assert sorted(read_points(folder), key=lambda point: point.name) == sorted(points, key=lambda point: point.name)

    def never(point: object) -> bool:
        return False

    more, _ = checked_points(*sweep("sweep.seeds=[0,1]", "sweep.axes.memory.tau=[0.5,0.7,0.9]"))
    check_folder(folder, more, grows=never)
    fewer, _ = checked_points(*sweep("sweep.axes.memory.tau=[0.5]"))
    with pytest.raises(ConfigError, match="holds the point tau_0.7-seed_0, which is not one of this sweep"):
        check_folder(folder, fewer, grows=never)
    check_folder(folder, fewer, grows=lambda point: point.setting == "tau_0.7")
    changed, _ = checked_points(*sweep("optim.lr=2e-2"))
    with pytest.raises(ConfigError, match=r"with other settings: optim.lr=1e-2, optim.lr=2e-2"):
        check_folder(folder, changed, grows=never)


def test_a_damaged_point_is_named(sweep) -> None:
    found, overrides = sweep()
    points, configs = checked_points(found, overrides)
    write_point(Path(found.folder), points[0], configs[points[0].name])
    path = points[0].folder(Path(found.folder)) / "point.json"
    for text in ("{", json.dumps({"name": "x"})):
        path.write_text(text)
        with pytest.raises(ConfigError, match="single-seed_0/point.json is damaged"):
            read_points(Path(found.folder))


@pytest.mark.parametrize(
    "folder",
    [
        "runs/a",
        "/tmp/with space,comma",
        "it's (here)",
        "back\\slash",
        "a=b{c}",
        "all/optim.lr=0.1",
        "end\\",
        "x\\'y",
        "Größe",
    ],
)
def test_the_command_of_a_point_composes_to_its_configuration(sweep, folder: str) -> None:
    found, overrides = sweep()
    points, configs = checked_points(found, overrides)
    words = shlex.split(command_line(Path(folder), points[1]))
    assert words[0] == "dla-train"
    config, expected = compose(words[1:]), configs[points[1].name]
    assert config.run_dir == f"{folder}_again/{points[1].name}"
    config.run_dir = expected.run_dir
    assert config == expected
    assert compose([*overrides, f"run_dir={quoted(folder)}"]).run_dir == folder


def test_illegal_points_beyond_a_screenful_are_counted(sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points_module, "ILLEGAL_SHOWN", 1)
    found, overrides = sweep()
    settings = [setting_of(found, {"memory.tau": tau}) for tau in (5, 6, 7)]
    with pytest.raises(ConfigError, match="tau_5-seed_0: .*\n  and 2 more"):
        check_points(found, points_of(found, overrides, settings))
