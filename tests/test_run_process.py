"""Processes of runs that another program starts: their command, and that their end and signals are handed on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dla_train import run_process
from dla_train.run_process import PointError, command, environment, run_to_end

ROOT = Path(__file__).parents[1]


def test_a_run_of_several_ranks_is_torchruns_with_signals_handed_on() -> None:
    assert command(["a=1"], 1) == [sys.executable, "-m", "dla_train.train", "a=1"]
    words = command(["a=1"], 2)
    assert "--nproc_per_node=2" in words and words[-3:] == ["-m", "dla_train.train", "a=1"]
    script = (ROOT / "launch/torchrun.sh").read_text()
    assert next(word for word in words if "signals" in word) in script


def test_a_run_does_not_inherit_a_place_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert "RANK" not in environment() and environment()["NCCL_DEBUG"] == "INFO"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are Python programs: the first word."""
    monkeypatch.setattr(run_process, "command", lambda words, ranks: [sys.executable, "-c", words[0]])


def test_an_exit_code_is_told_as_a_failed_point(program: None) -> None:
    run_to_end(["exit(0)"], 1, "runs/a")
    with pytest.raises(PointError, match="runs/a ended with exit code 7"):
        run_to_end(["exit(7)"], 1, "runs/a")
    with pytest.raises(PointError, match="runs/a ended with exit code -9"):
        run_to_end(["import os; os.kill(os.getpid(), 9)"], 1, "runs/a")


def test_the_signal_of_submitit_does_not_kill_a_run(program: None) -> None:
    run_to_end(["import os, signal; os.kill(os.getpid(), signal.SIGUSR2)"], 1, "runs/a")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_run_and_ends_this_process_with_its_exit_code(number: signal.Signals) -> None:
    run = """
import os, signal, sys, time
def stop(number, frame):
    print(int(number), flush=True)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, stop)
print(os.getpgid(0), flush=True)
time.sleep(60)
"""
    program = f"""
import sys
from dla_train import run_process
run_process.command = lambda words, ranks: [sys.executable, "-c", words[0]]
run_process.run_to_end([{run!r}], 1, "runs/a")
print("another point begins")
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert int(process.stdout.readline()) != os.getpgid(0), "what a terminal sends to its group comes once"
    process.send_signal(number)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and told == f"{int(number)}\n"
