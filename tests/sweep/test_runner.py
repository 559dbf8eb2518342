"""The loop of a sweep, with runs that are over at once: each point once, through every kind of end."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from dla_train.sweep.command import checked_points
from dla_train.sweep.launchers import Job
from dla_train.sweep.outcomes import Outcome, read_outcome
from dla_train.sweep.runner import SweepRun
from dla_train.sweep.tpe import STARTUP_TRIALS, Study
from tests.sweep.conftest import FakeJob, FakeLauncher, leave, write_metrics

VALUES = {"single": 3.0, "tau_0.5": 2.0, "tau_0.7": 2.5}


def all_finish(name: str, start: int) -> tuple[str, float]:
    return "finishes", VALUES[name.partition("-")[0]]


@pytest.fixture
def do(sweep, tmp_path: Path) -> Callable[..., bool]:
    """do(launcher, words ...) -> one start of the sweep in tmp_path/sweep; whether it came to the end."""

    def start(launcher: FakeLauncher, *words: str) -> bool:
        found, overrides = sweep(*words)
        (tmp_path / "sweep").mkdir(exist_ok=True)
        study = Study(found) if found.sampler == "tpe" else None
        return SweepRun(found, overrides, launcher, study).run(*checked_points(found, overrides))

    return start


def outcome(tmp_path: Path, name: str) -> Outcome | None:
    return read_outcome(tmp_path / "sweep/points" / name)


def test_every_point_runs_once_never_more_at_a_time_than_there_are_places(do, tmp_path: Path) -> None:
    launcher = FakeLauncher(all_finish)
    assert do(launcher, "sweep.seeds=[0,1]")
    assert sorted(launcher.started) == sorted(f"{name}-seed_{seed}" for name in VALUES for seed in (0, 1))
    assert launcher.most == 2 and launcher.free() == 2
    assert outcome(tmp_path, "tau_0.5-seed_1") == Outcome("finished", 8, 2.0)
    again = FakeLauncher(all_finish)
    assert do(again, "sweep.seeds=[0,1]") and again.started == []


def test_more_seeds_and_values_run_what_is_new(do) -> None:
    assert do(FakeLauncher(all_finish))
    launcher = FakeLauncher(lambda name, start: ("finishes", 1.0))
    assert do(launcher, "sweep.seeds=[0,1]", "sweep.axes.memory.tau=[0.5,0.7,0.9]")
    assert "tau_0.9-seed_0" in launcher.started and len(launcher.started) == 5


@pytest.mark.parametrize(
    "kind, number, starts, reason",
    [
        ("diverges", 0.0, 1, "loss is nan"),
        ("errs", 2.0, 1, "data.train=[nowhere] is not there"),
        ("errs", 1.0, 1, "data.train=[nowhere] is not there"),  # torchrun's exit code
        ("dies", -9.0, 2, "killed by SIGKILL (2 starts)"),
        ("dies", 4.0, 2, "a phase hung, see hangs/ (2 starts)"),
        ("dies", 1.0, 2, "ended without a word (2 starts)"),
        ("finishes", float("nan"), 1, "validation_loss is nan"),
    ],
)
def test_a_point_that_fails_is_kept_with_its_reason_and_the_others_go_on(
    do, tmp_path: Path, kind: str, number: float, starts: int, reason: str
) -> None:
    def script(name: str, start: int) -> tuple[str, float]:
        return (kind, number) if name.startswith("tau_0.5") else all_finish(name, start)

    launcher = FakeLauncher(script)
    assert do(launcher), "a failure is an end"
    found = outcome(tmp_path, "tau_0.5-seed_0")
    assert found is not None and found.state == "failed" and found.reason == reason
    assert launcher.started.count("tau_0.5-seed_0") == starts
    assert outcome(tmp_path, "tau_0.7-seed_0") == Outcome("finished", 8, 2.5)
    again = FakeLauncher(all_finish)
    assert do(again) and again.started == [], "a failed point stays failed"


def test_a_point_that_dies_once_is_started_again_and_counts(do, tmp_path: Path) -> None:
    launcher = FakeLauncher(lambda name, start: ("dies", -9.0) if start == 1 else all_finish(name, start))
    assert do(launcher)
    assert outcome(tmp_path, "single-seed_0") == Outcome("finished", 8, 3.0)
    assert len(launcher.started) == 6


def test_a_status_of_an_earlier_start_does_not_speak_for_this_one(do, tmp_path: Path) -> None:
    """The run said `stopped` long ago; a start that dies before it says anything has died."""

    def script(name: str, start: int) -> tuple[str, float]:
        return ("errs", 1.0) if name.startswith("tau_0.5") else all_finish(name, start)

    run_dir = tmp_path / "sweep/points/tau_0.5-seed_0"
    run_dir.mkdir(parents=True)
    (run_dir / "status.json").write_text('{"state": "stopped", "step": 4, "exit_code": 75, "reason": ""}')
    assert do(FakeLauncher(script))
    found = outcome(tmp_path, "tau_0.5-seed_0")
    assert found is not None and (found.state, found.step) == ("failed", 4)


def test_a_run_that_ended_while_no_sweep_watched_is_not_run_again(do, tmp_path: Path) -> None:
    run_dir = tmp_path / "sweep/points/single-seed_0"
    run_dir.mkdir(parents=True)
    leave(FakeJob(run_dir, ("finishes", 1.5)), "finishes", 1.5)
    launcher = FakeLauncher(all_finish)
    assert do(launcher)
    assert "single-seed_0" not in launcher.started
    assert outcome(tmp_path, "single-seed_0") == Outcome("finished", 8, 1.5)


def test_a_run_that_a_killed_sweep_left_at_work_is_waited_for(do, tmp_path: Path) -> None:
    run_dir = tmp_path / "sweep/points/single-seed_0"
    run_dir.mkdir(parents=True)
    left = FakeJob(run_dir, ("finishes", 1.5), code=None, working=True)

    def script(name: str, start: int) -> tuple[str, float]:
        if name == "tau_0.7-seed_0":  # the last to start
            leave(left, "finishes", 1.5)
            left.working = False
        return all_finish(name, start)

    launcher = FakeLauncher(script, adopted={"single-seed_0": left})
    assert do(launcher)
    assert launcher.started == ["tau_0.5-seed_0", "tau_0.7-seed_0"] and launcher.most == 2
    assert outcome(tmp_path, "single-seed_0") == Outcome("finished", 8, 1.5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_every_point_once_and_starts_no_other(do, tmp_path: Path, number: signal.Signals) -> None:
    def script(name: str, start: int) -> tuple[str, float]:
        if name.startswith("tau"):
            os.kill(os.getpid(), number)
        return "works", 3.0

    before = signal.getsignal(number)
    launcher = FakeLauncher(script)
    assert not do(launcher), "it did not come to the end"
    assert signal.getsignal(number) == before
    assert launcher.started == ["single-seed_0", "tau_0.5-seed_0"]
    assert [job.stops for job in launcher.jobs] == [1, 1]
    assert outcome(tmp_path, "single-seed_0") is None
    again = FakeLauncher(all_finish)
    assert do(again) and len(again.started) == 3, "stopped points go on"


def test_a_second_signal_leaves_points_that_take_their_time(do) -> None:
    class Slow(FakeJob):
        def stop(self) -> None:
            self.stops += 1
            os.kill(os.getpid(), signal.SIGTERM)

    class SlowLauncher(FakeLauncher):
        def start(self, run_dir, overrides) -> Job:
            job = super().start(run_dir, overrides)
            self.jobs[-1] = Slow(**vars(job))
            if len(self.jobs) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.jobs[-1]

    launcher = SlowLauncher(lambda name, start: ("works", 3.0))
    assert not do(launcher)
    assert sum(job.stops for job in launcher.jobs) >= 1 and all(job.running() for job in launcher.jobs)


def test_a_point_that_somebody_else_stopped_is_left_stopped(do) -> None:
    class Stopping(FakeLauncher):
        def start(self, run_dir, overrides) -> FakeJob:
            job = super().start(run_dir, overrides)
            if run_dir.name == "single-seed_0":
                job.stop()
            return job

    launcher = Stopping(lambda name, start: ("works", 1.0) if "single" in name else all_finish(name, start))
    assert not do(launcher)
    assert launcher.started.count("single-seed_0") == 1 and len(launcher.started) == 3


TPE = ("sweep.sampler=tpe", "sweep.axes.memory.tau={low: 0.5, high: 0.9}")


def trial_value(name: str, start: int) -> tuple[str, float]:
    tau = name.partition("tau_")[2].partition("-")[0]
    return "finishes", 1.0 + (float(tau) - 0.6) ** 2 if tau else 3.0


def test_a_search_is_told_the_mean_over_seeds_and_goes_on_after_a_restart(do, sweep, tmp_path: Path) -> None:
    assert do(FakeLauncher(trial_value), *TPE, "sweep.budget=3", "sweep.seeds=[0,1]")
    launcher = FakeLauncher(trial_value)
    assert do(launcher, *TPE, "sweep.budget=5", "sweep.seeds=[0,1]")
    assert len(launcher.started) == 4 and all(name.startswith(("trial_003", "trial_004")) for name in launcher.started)
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/sweep/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 5
    assert all(trial.value == pytest.approx(1 + (trial.params["memory.tau"] - 0.6) ** 2) for trial in study.trials)


def states_of(tmp_path: Path) -> list[str]:
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/sweep/study.db")
    return [trial.state.name for trial in study.trials]


def test_a_trial_that_fails_is_told_as_failed_and_the_search_goes_on(do, tmp_path: Path) -> None:
    def script(name: str, start: int) -> tuple[str, float]:
        return ("diverges", 0.0) if name.startswith("trial_001") else trial_value(name, start)

    assert do(FakeLauncher(script), *TPE, "sweep.budget=3")
    assert states_of(tmp_path) == ["COMPLETE", "FAIL", "COMPLETE"]


def test_a_proposal_that_breaks_a_rule_is_passed_over_also_after_a_restart(do, tmp_path: Path, capsys) -> None:
    """Chunks of 16 and 32 tokens are legal, those in between are not."""
    rows = "sweep.axes={memory.chunk_tokens: {low: 16, high: 32, integer: true}}"
    words = ("sweep.sampler=tpe", rows, "sweep.budget=6")
    launcher = FakeLauncher(lambda name, start: ("finishes", 2.0))
    assert do(launcher, *words)
    assert "is passed over" in capsys.readouterr().out
    assert "FAIL" in states_of(tmp_path) and len(states_of(tmp_path)) == 6
    assert len(launcher.started) == 1 + states_of(tmp_path).count("COMPLETE")
    again = FakeLauncher(trial_value)
    assert do(again, *words) and again.started == [] and len(states_of(tmp_path)) == 6


def test_a_trial_behind_the_median_is_stopped_and_kept_as_pruned(do, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dla_train.sweep.runner.PRUNE_SECONDS", 0.0)

    class Watching(FakeLauncher):
        def start(self, run_dir, overrides) -> FakeJob:
            job = super().start(run_dir, overrides)
            if job.ends[0] == "works":
                write_metrics(run_dir, {4: 99.0})
            return job

    def script(name: str, start: int) -> tuple[str, float]:
        if name.startswith(f"trial_{STARTUP_TRIALS:03d}"):
            return "works", 99.0
        return trial_value(name, start)

    launcher = Watching(script, places=1)
    assert do(launcher, *TPE, f"sweep.budget={STARTUP_TRIALS + 1}", "sweep.prune=true")
    found = outcome(tmp_path, next(name for name in launcher.started if name.startswith(f"trial_{STARTUP_TRIALS:03d}")))
    assert found is not None and found.state == "pruned" and "median" in found.reason and found.step == 4
    assert launcher.jobs[-1].stops == 1
