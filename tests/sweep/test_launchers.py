"""Processes of points: their share of the machine, and that a killed sweep leaves none that it would not find."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dla_train.config import ConfigError
from dla_train.sweep import launchers
from dla_train.sweep.launchers import LocalLauncher, slot_environments


def test_cores_are_divided_and_devices_are_nobody_elses() -> None:
    assert [e["OMP_NUM_THREADS"] for e in slot_environments(0, 1, 8, [])] == ["1"] * 8
    assert [e["OMP_NUM_THREADS"] for e in slot_environments(2, 2, 16, [])] == ["4"] * 2
    assert [e["OMP_NUM_THREADS"] for e in slot_environments(0, 4, 2, [])] == ["1"], "one point always fits"
    found = slot_environments(0, 2, 16, ["0", "1", "4", "5", "6"])
    assert [e["CUDA_VISIBLE_DEVICES"] for e in found] == ["0,1", "4,5"]
    assert "CUDA_VISIBLE_DEVICES" not in slot_environments(1, 1, 2, [])[0]


@pytest.mark.parametrize("parallel, ranks", [(3, 2), (0, 5), (1, 8)])
def test_more_devices_than_there_are_is_an_error(parallel: int, ranks: int) -> None:
    with pytest.raises(ConfigError, match=r"sweep.parallel=\d .*need \d+ devices, and there are 4"):
        slot_environments(parallel, ranks, 16, ["0", "1", "2", "3"])


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> LocalLauncher:
    """Its runs are Python programs: the word that would be the settings."""
    monkeypatch.setattr(launchers, "command", lambda words, ranks: [sys.executable, "-c", words[0]])
    return LocalLauncher([{"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "4"}], 1)


def wait(job: launchers.Job) -> int | None:
    deadline = time.monotonic() + 20
    while job.running():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return job.exit_code()


def test_a_job_has_its_slots_variables_no_launchers_ranks_and_its_output_in_a_file(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    job = launcher.start(tmp_path, ["import os; print(os.environ['OMP_NUM_THREADS'], os.environ.get('RANK')); exit(7)"])
    assert launcher.free() == 1
    assert wait(job) == 7
    launcher.release(job)
    assert launcher.free() == 2 and (tmp_path / "output.log").read_text().endswith("3 None\n")


def test_a_job_is_found_again_while_it_lives_and_can_be_stopped(launcher: LocalLauncher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path, ["import time; time.sleep(60)"])
    other = LocalLauncher([{}, {}], 1)
    found = other.adopt(tmp_path)
    assert found is not None and found.running() and found.exit_code() is None and other.free() == 1
    found.stop()
    assert wait(job) == -signal.SIGTERM
    assert not found.running() and other.adopt(tmp_path) is None
    found.stop()  # nobody is there any more
    assert other.adopt(tmp_path / "points") is None


def test_a_sweep_that_is_killed_before_it_wrote_the_process_down_leaves_none(tmp_path: Path) -> None:
    """The shell waits for a word that never comes, and ends; the run has not begun."""
    program = f"""
import os, signal, sys
from pathlib import Path
from dla_train.sweep import launchers
launchers.command = lambda words, ranks: [sys.executable, "-c", "open({str(tmp_path / "ran")!r}, 'w')"]
def killed(pid):
    print(pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
launchers.process_record = killed
launchers.LocalLauncher([{{}}], 1).start(Path({str(tmp_path)!r}), [])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the shell still waits"
        time.sleep(0.01)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "start.json").exists()


def test_the_record_names_the_process(launcher: LocalLauncher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path, ["import os; print(os.getpid())"])
    wait(job)
    record = json.loads((tmp_path / "start.json").read_text())
    assert (tmp_path / "output.log").read_text().split()[-1] == str(record["pid"]) and record["slot"] == 0


def test_a_run_on_another_host_is_not_started_a_second_time(launcher: LocalLauncher, tmp_path: Path) -> None:
    there = json.dumps({"host": "elsewhere", "processes": "", "pid": 1, "started": "1", "slot": 0})
    (tmp_path / "start.json").write_text(there)
    assert launcher.adopt(tmp_path) is None, "nobody trains there"
    (tmp_path / "run.lock").write_text(there)
    with pytest.raises(ConfigError, match="is being trained on elsewhere; start the sweep there"):
        launcher.adopt(tmp_path)
