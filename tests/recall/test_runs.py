"""A study as a whole: what is run, kept, compared and written."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dla_train.config import ConfigError
from dla_train.recall.command import render
from dla_train.recall.comparison import compare_arms
from dla_train.recall.report import tables, write_page
from dla_train.recall.results import read_results, write_results
from dla_train.recall.runs import Run, StudyRuns, best_rate, run_study, tuning_accuracies
from dla_train.recall.settings import compose
from dla_train.recall.training import Judgement


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A finished study with a choice of learning rates, and its runs."""
    from tests.recall.conftest import TINY

    folder = tmp_path_factory.mktemp("study")
    study = dataclasses.replace(
        TINY, output=str(folder), learning_rates=[1e-3, 1e-2], tuning_seeds=[8, 9], steps=30, processes=2
    )
    return study, run_study(study)


def with_accuracies(runs, accuracies):
    """The same runs with other accuracies: {arm: {seed: (few, many)}}."""
    results = {}
    for name, by_seed in accuracies.items():
        some = next(iter(runs.results[name].values()))
        results[name] = {
            seed: dataclasses.replace(
                some, parts={"few": Judgement(few, 1.0, None), "many": Judgement(many, 1.0, None)}
            )
            for seed, (few, many) in by_seed.items()
        }
    return dataclasses.replace(runs, results=results)


def test_every_arm_runs_every_seed_at_the_rate_that_was_best_for_it_on_average(ended):
    study, runs = ended
    for arm in runs.arms:
        assert sorted(runs.results[arm.name]) == study.seeds
        tried = runs.tuning[arm.name]
        assert sorted(tried) == study.learning_rates
        assert all(sorted(by_seed) == study.tuning_seeds for by_seed in tried.values())
        means = {rate: sum(by_seed.values()) / len(by_seed) for rate, by_seed in tried.items()}
        assert means[runs.rates[arm.name]] == max(means.values())


def test_a_rate_chosen_before_is_taken_and_its_arm_not_tuned(ended, monkeypatch):
    study, runs = ended
    monkeypatch.setattr("dla_train.recall.runs.do_run", None)
    name = runs.arms[0].name
    again = run_study(dataclasses.replace(study, rates={name: runs.rates[name]}))
    assert again.results == runs.results and set(again.tuning) == set(runs.tuning) - {name}
    with pytest.raises(ConfigError, match="rates.gated_deltanet_sinlge is none of the arms: gated_deltanet_single"):
        run_study(dataclasses.replace(study, rates={"gated_deltanet_sinlge": 1e-3}))


def test_a_learning_rate_at_which_a_tuning_run_failed_is_not_chosen_for_the_others_accuracy(ended):
    study, runs = ended
    arm = runs.arms[0]
    result = runs.results[arm.name][0]
    planned = [Run(arm, rate, seed, "tuning") for seed in (8, 9) for rate in (1e-3, 1e-2)]
    good = dataclasses.replace(result, parts={"few": Judgement(0.9, 1.0, None)})
    fair = dataclasses.replace(result, parts={"few": Judgement(0.5, 1.0, None)})
    found = tuning_accuracies(planned, zip(planned[:3], [fair, good, fair], strict=True))[arm.name]
    assert found == {1e-3: {8: 0.5, 9: 0.5}, 1e-2: {8: 0.9, 9: 0.0}}
    assert best_rate(found) == 1e-3


def test_what_is_kept_was_run_at_the_rates_that_tuning_chose():
    folder = Path(__file__).parents[2] / "docs" / "results" / "recall"
    study, tuning = read_results(folder / "paired_token_tuning.json")
    assert compose(["study=paired_token"]).rates == tuning.rates
    assert read_results(folder / "paired_token.json")[1].results == tuning.results
    assert {name: best_rate(tried) for name, tried in tuning.tuning.items()} == tuning.rates
    assert len(study.tuning_seeds) == 2


def test_a_finished_study_is_read_and_not_run_again(ended, monkeypatch):
    study, runs = ended
    monkeypatch.setattr("dla_train.recall.runs.do_run", None)  # would fail in the process that does it
    assert run_study(study) == runs


def test_one_run_that_is_missing_is_done_and_the_others_stay(ended):
    study, runs = ended
    files = sorted((Path(study.output) / "runs").glob("*.json"))
    before = {file: file.stat().st_mtime_ns for file in files}
    files[0].unlink()
    again = run_study(study)
    changed = [file for file in files if file.stat().st_mtime_ns != before[file]]
    assert changed == [files[0]]
    key = [dataclasses.replace(r, seconds=0.0) for a in again.arms for r in again.results[a.name].values()]
    assert key == [dataclasses.replace(r, seconds=0.0) for a in runs.arms for r in runs.results[a.name].values()]


def test_runs_of_other_settings_in_the_folder_are_an_error(ended):
    study, _ = ended
    with pytest.raises(ConfigError, match="is a run of other settings .steps differ."):
        run_study(dataclasses.replace(study, steps=31))


def test_a_study_of_another_name_takes_over_the_runs_it_shares(ended, monkeypatch):
    study, runs = ended
    monkeypatch.setattr("dla_train.recall.runs.do_run", None)
    assert run_study(dataclasses.replace(study, name="other")).results == runs.results


def test_a_damaged_file_is_named(ended, tmp_path):
    study, _ = ended
    files = sorted((Path(study.output) / "runs").glob("*.json"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / files[0].name).write_text(files[0].read_text()[:-20])
    with pytest.raises(ConfigError, match=f"{files[0].name} is damaged"):
        run_study(dataclasses.replace(study, output=str(tmp_path)))


def test_a_run_that_fails_is_told_and_the_others_go_on(tiny, tmp_path):
    study = dataclasses.replace(tiny, output=str(tmp_path), learning_rates=[1e30], seeds=[0])
    runs = run_study(study)
    assert set(runs.failures) == {"gated_deltanet_single_lr1e+30_seed0", "gated_deltanet_dla_lr1e+30_seed0"}
    assert "failed" in tables(study, runs, compare_arms(study, runs))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_study_leaves_no_process_behind(tmp_path, number, code):
    words = ["study=paired_token", f"output={tmp_path}", "processes=1", "steps=100000", "seeds=[0]", "progress=false"]
    study = subprocess.Popen(
        [sys.executable, "-m", "dla_train.recall.command", *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    workers = wait_for(lambda: [p for p in psutil.Process(study.pid).children(True) if busy(p)])
    os.kill(study.pid, number)
    try:
        _, errors = study.communicate(timeout=60)
    finally:
        study.kill()
    assert study.returncode == code, errors
    assert not psutil.wait_procs(workers, timeout=60)[1]


def busy(process):
    """Whether a process has done more than come up: it trains."""
    return process.cpu_times().user > 4


def wait_for(condition):
    """What `condition` gives, once that is something."""
    end = time.monotonic() + 300
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def test_differences_are_taken_seed_by_seed(ended):
    study, runs = ended
    found = compare_arms(
        study,
        with_accuracies(
            runs,
            {
                "gated_deltanet_single": {0: (1.0, 0.2), 1: (1.0, 0.4)},
                "gated_deltanet_dla": {0: (1.0, 0.5), 1: (1.0, 0.7)},
            },
        ),
    )
    single, dla = (numbers.parts["many"] for numbers in found)
    assert single.difference is None and dla.difference is not None
    assert dla.difference.mean == pytest.approx(0.3)
    assert dla.difference.high - dla.difference.low == pytest.approx(0, abs=1e-9)  # the seeds' spread cancels
    assert dla.accuracy.high - dla.accuracy.low > 1
    assert dla.clear is False


@pytest.mark.parametrize(
    ("single", "dla", "clear"), [((0.2, 0.21), (0.5, 0.51), True), ((0.5, 0.51), (0.2, 0.21), False)]
)
def test_arms_are_clear_of_each_other_only_in_favour(ended, single, dla, clear):
    study, runs = ended
    accuracies = {
        "gated_deltanet_single": {seed: (1.0, value) for seed, value in enumerate(single)},
        "gated_deltanet_dla": {seed: (1.0, value) for seed, value in enumerate(dla)},
    }
    found = compare_arms(study, with_accuracies(runs, accuracies))
    assert found[1].parts["many"].clear is clear


def test_an_arm_that_has_not_learnt_the_easy_part_with_every_seed_is_void_and_still_told(ended):
    study, runs = ended
    accuracies = {
        "gated_deltanet_single": {0: (1.0, 0.2), 1: (0.29, 0.4)},
        "gated_deltanet_dla": {0: (0.3, 0.5), 1: (1.0, 0.7)},
    }
    changed = with_accuracies(runs, accuracies)
    found = compare_arms(study, changed)
    assert found[0].void == "few at 29.0% (seeds [1]), below 30%" and found[1].void is None
    assert "void: few at 29.0%" in tables(study, changed, found)


def test_a_missing_seed_voids_its_arm(ended):
    study, runs = ended
    accuracies = {"gated_deltanet_single": {0: (1.0, 0.2), 1: (1.0, 0.4)}, "gated_deltanet_dla": {1: (1.0, 0.7)}}
    found = compare_arms(study, with_accuracies(runs, accuracies))[1]
    assert found.void == "seeds [0] failed"
    assert found.parts["many"].difference is None


def test_arms_are_not_compared_with_a_void_baseline_or_one_that_failed_altogether(ended):
    study, runs = ended
    dla = {0: (1.0, 0.5), 1: (1.0, 0.7)}
    for single in ({0: (1.0, 0.2), 1: (0.0, 0.4)}, {}):
        changed = with_accuracies(runs, {"gated_deltanet_single": single, "gated_deltanet_dla": dla})
        assert compare_arms(study, changed)[-1].parts["many"].difference is None
    del changed.results["gated_deltanet_single"]  # as in a file that was read back
    changed = dataclasses.replace(changed, arms=changed.arms[1:])
    assert compare_arms(study, changed)[-1].parts["many"].accuracy.mean == pytest.approx(0.6)


def test_the_page_and_the_pictures_can_be_made_of_the_json_alone(ended, tmp_path):
    study, runs = ended
    write_results(study, runs, tmp_path / "tiny.json")
    kept_study, kept = read_results(tmp_path / "tiny.json")
    assert isinstance(kept, StudyRuns)
    text = write_page(study, runs, tmp_path / "a", tmp_path / "a")
    assert render([str(tmp_path), str(tmp_path / "images")]) == 0
    assert (tmp_path / "tiny.md").read_text().startswith(text)
    assert "(images/tiny_accuracy.png)" in (tmp_path / "tiny.md").read_text()
    for name in ("tiny_accuracy.png", "tiny_curves.png"):
        assert (tmp_path / "images" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert tables(kept_study, kept, compare_arms(kept_study, kept)) == text
    json.loads((tmp_path / "tiny.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_a_file_that_is_no_study_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no results of dla-recall"):
        read_results(tmp_path / "other.json")
