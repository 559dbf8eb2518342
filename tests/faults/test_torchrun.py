"""The launcher as users start it: signals reach every rank, a dead rank is started again, nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dla_train.resilience.exit_codes import STOPPED, read_status
from dla_train.trackers import read_lines
from tests.train.runs import ROOT, TINY, numbers_of, tensors_of

STEPS = 400
"""Enough for a signal to come in the middle of them."""


def launch(run_dir: Path, corpus: list[str], *more: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    settings = [*TINY, *corpus, "train.micro_batch_rows=2", f"train.steps={STEPS}", f"run_dir={run_dir}", *more]
    return subprocess.Popen(
        [str(ROOT / "launch/torchrun.sh"), *settings],
        env={**os.environ, "PYTHONPATH": path, "RANKS": "2", "PYTHON": sys.executable, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(run_dir: Path, step: int, job: subprocess.Popen[str]) -> None:
    """Until metrics.jsonl has a line of `step`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and job.poll() is None:
        if any(line["step"] >= step for line in read_lines(run_dir / "metrics.jsonl")):
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached: {job.communicate()[0][-2000:]}")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_signal_to_the_launcher_stops_and_saves_the_run_and_the_same_command_goes_on(
    corpus: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    job = launch(tmp_path / "run", corpus)
    wait_for_step(tmp_path / "run", 3, job)
    job.send_signal(number)
    output, _ = job.communicate(timeout=60)
    status = read_status(tmp_path / "run")
    assert status and (status["state"], status["exit_code"]) == ("stopped", STOPPED), output[-2000:]
    step = status["step"]
    assert 3 <= step < STEPS and (tmp_path / f"run/checkpoints/step_{step:08d}/COMPLETE").is_file()
    job = launch(tmp_path / "run", corpus, f"train.stop_at_step={step + 5}")
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output[-2000:]
    assert [line[0] for line in numbers_of(tmp_path / "run", "loss")] == list(range(1, step + 6))


def test_a_killed_rank_is_started_again_with_all_others_and_the_run_ends_as_if_nothing_had_been(
    corpus: list[str], tmp_path: Path
) -> None:
    settings = ("train.stop_at_step=40", "checkpoint.interval_steps=5")
    whole = launch(tmp_path / "whole", corpus, *settings)
    job = launch(tmp_path / "run", corpus, *settings, RESTARTS="2")
    wait_for_step(tmp_path / "run", 12, job)
    ranks = subprocess.run(["pgrep", "-f", f"dla_train.train.*run_dir={tmp_path}/run"], capture_output=True, text=True)
    children = [int(pid) for pid in ranks.stdout.split() if int(pid) != job.pid]
    os.kill(children[-1], signal.SIGKILL)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and "continues after step" in output, output[-3000:]
    output, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, output[-2000:]
    assert numbers_of(tmp_path / "run", "loss", "grad_norm") == numbers_of(tmp_path / "whole", "loss", "grad_norm")
    expected, found = tensors_of(tmp_path / "whole", 40), tensors_of(tmp_path / "run", 40)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if not name.startswith("rng/"))
