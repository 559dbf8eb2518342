"""`dla-sweep` as a user starts it, with real runs: killed, resumed, stopped, failing, and what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dla_train.checkpoint.run_lock import RunLock
from dla_train.runs import main as dla_runs
from dla_train.runs import read_run
from dla_train.sweep.command import run
from dla_train.sweep.outcomes import read_outcome
from dla_train.sweep.points import read_points
from tests.sweep.conftest import SWEPT
from tests.train.runs import ROOT, numbers_of

SEARCH_SEED = "sweep.sampler_seed=9"
"""With it the search tries a learning rate, then a lower one, at which the loss falls more slowly at every step."""


@pytest.fixture
def words(corpus: list[str], tmp_path: Path) -> list[str]:
    """One setting of dla and one baseline over a real corpus."""
    file = tmp_path / "small.yaml"
    file.write_text("settings: [memory=dla]\naxes: {memory.tau: [0.7]}\nbaselines: {single: [memory=single]}\n")
    own = {word.partition("=")[0] for word in corpus}
    swept = [word for word in SWEPT if word.partition("=")[0] not in own]
    return [f"sweep={file}", f"sweep.folder={tmp_path}/sweep", *swept, *corpus, "checkpoint.interval_steps=2"]


def begin(words: Sequence[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "dla_train.sweep.command", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 60) -> None:
    """Until the condition holds; fails when the process ends before, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_a_killed_sweep_goes_on_with_runs_that_it_left_at_work_and_runs_each_point_once(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    process = begin([*words, "sweep.parallel=2", "sweep.axes.memory.tau=[0.7,7]"])
    told, _ = process.communicate()
    assert process.returncode == 2 and "tau_7-seed_0: memory.tau=7" in told and not folder.exists()

    # long enough to be met at work; the point without data fails whatever happens
    words = [*words, "train.steps=60", "sweep.parallel=2", "sweep.baselines.broken=['data.train=[nowhere]']"]
    process = begin(words)
    single = folder / "points/single-seed_0"
    wait_for(
        lambda: (single / "checkpoints").is_dir() and any((single / "checkpoints").glob("step_*/COMPLETE")), process
    )
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run(words) == 1, "one failed"
    told = capfd.readouterr().out
    assert "single-seed_0 is still running" in told
    assert f"1 of 3 points failed; again: dla-sweep resume {folder} sweep.retry_failed=true" in told
    points = read_points(folder)
    assert [point.name for point in points] == ["broken-seed_0", "single-seed_0", "tau_0.7-seed_0"]
    for point in points[1:]:
        output = (point.folder(folder) / "output.log").read_text()
        assert output.count("== dla-sweep starts the run") == 1, "each point was started once"
        assert [step for step, _ in numbers_of(point.folder(folder), "loss")] == list(range(1, 61))
    broken = json.loads((folder / "points/broken-seed_0/outcome.json").read_text())
    assert broken["state"] == "failed" and "nowhere" in broken["reason"]
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "Failed points" in page and "Failed points" in text and "nowhere" in text
    assert "dla-train model.name=tiny" in text and "difference to single" in text
    kept = {item["point"]["name"]: item for item in json.loads((folder / "report.json").read_text())["points"]}
    assert kept["broken-seed_0"]["versions"] == {} and "torch" in kept["single-seed_0"]["versions"]
    assert run(words) == 1 and "starts" not in capfd.readouterr().out, "again: nothing is left to do"
    assert dla_runs([str(folder), "--json"]) == 0
    states = {Path(item["folder"]).name: item["state"] for item in json.loads(capfd.readouterr().out)}
    assert states == {"broken-seed_0": "waiting", "single-seed_0": "finished", "tau_0.7-seed_0": "finished"}


def test_a_stopped_sweep_saves_its_points_and_goes_on_from_their_checkpoints(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "a sweep"
    words = [*words, f"sweep.folder='{folder}'", "train.steps=400", "sweep.baselines={}", "checkpoint=end"]
    process = begin(words)
    run_dir = folder / "points/tau_0.7-seed_0"
    wait_for(lambda: (run_dir / "metrics.jsonl").is_file() and bool(numbers_of(run_dir, "loss")), process)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert f"go on with: dla-sweep resume '{folder}'\n" in told and "saved" in told
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "stopped" and 0 < status["step"] < 400
    assert (run_dir / f"checkpoints/step_{status['step']:08d}/COMPLETE").is_file()
    process = begin(["resume", str(folder)])
    wait_for(lambda: len(numbers_of(run_dir, "loss")) > status["step"], process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert f"continues after step {status['step']}" in (run_dir / "output.log").read_text()
    assert read_run(run_dir).state == "running"
    os.kill(json.loads((run_dir / "start.json").read_text())["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while read_run(run_dir).state == "running":
        assert time.monotonic() < deadline
    assert read_run(run_dir).state == "died"


def test_a_point_of_two_ranks_is_started_by_torchrun(words: list[str], tmp_path: Path) -> None:
    words = [*words, "sweep.ranks=2", "sweep.baselines={}", "parallel.tensor=2"]
    assert run(words) == 0
    output = (tmp_path / "sweep/points/tau_0.7-seed_0/output.log").read_text()
    assert "2 rank(s) on cpu" in output


def test_two_sweeps_in_one_folder_are_refused(words: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "sweep").mkdir()
    lock = RunLock(tmp_path / "sweep")
    try:
        assert run(words) == 2
    finally:
        lock.release()
    assert "is at work already" in capsys.readouterr().err
    assert not (tmp_path / "sweep/points").exists()


def test_list_shows_every_point_and_starts_nothing(words: list[str], tmp_path: Path, capsys) -> None:
    assert run(["list", *words]) == 0
    told = capsys.readouterr().out
    assert "single-seed_0 model.name=tiny" in told and "2 points, all legal" in told
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["report", "{tmp}"], "holds no sweep.json"),
        (["report"], "0 folders were named"),
        (["resume", "{tmp}"], "holds no sweep.json"),
        (["sweep=nothing"], "there is no"),
    ],
)
def test_mistakes_end_in_one_paragraph_and_2(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert run([word.replace("{tmp}", str(tmp_path)) for word in arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("dla-sweep: error: ") and message in told


def test_the_help_is_shown(capsys) -> None:
    assert run(["--help"]) == 0 and run([]) == 2
    assert "dla-sweep report FOLDER" in capsys.readouterr().out


def test_a_search_stops_a_real_run_that_lies_behind_and_keeps_it_as_pruned(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dla_train.sweep.tpe.STARTUP_TRIALS", 1)
    monkeypatch.setattr("dla_train.sweep.runner.PRUNE_SECONDS", 0.1)
    monkeypatch.setattr("dla_train.sweep.launchers.available_cores", lambda: 1)  # two threads cost a tiny run time
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    file = tmp_path / "search.yaml"
    file.write_text("sampler: tpe\naxes: {optim.lr: {low: 1.0e-8, high: 1.0e-2, log: true}}\nbudget: 2\nprune: true\n")
    own = {word.partition("=")[0] for word in [*corpus, "optim.lr=1"]}
    swept = [word for word in SWEPT if word.partition("=")[0] not in own]
    runs = [*swept, *corpus, "train.steps=60", "logging.interval_steps=10"]
    assert run([f"sweep={file}", f"sweep.folder={tmp_path}/sweep", "sweep.parallel=1", SEARCH_SEED, *runs]) == 0
    first, second = read_points(tmp_path / "sweep")
    assert first.trial == 0 and first.values["optim.lr"] > second.values["optim.lr"]
    good, bad = (read_outcome(point.folder(tmp_path / "sweep")) for point in (first, second))
    assert good and good.state == "finished" and good.step == 60 and good.value
    assert bad and bad.state == "pruned" and 0 < bad.step < 60 and "above the median" in bad.reason
    assert (second.folder(tmp_path / "sweep") / f"checkpoints/step_{bad.step:08d}/COMPLETE").is_file()
