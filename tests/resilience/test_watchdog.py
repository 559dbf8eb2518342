"""A phase over its limit ends the process with its stacks written down; one within it does not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dla_train.resilience.exit_codes import HUNG
from dla_train.resilience.watchdog import Watchdog
from tests.train.runs import ROOT

PROGRAM = """
import sys, threading, time
from pathlib import Path
from dla_train.resilience.watchdog import Watchdog

def wait_for_ever():
    time.sleep(60)

with Watchdog({"step": 0.4, "save": 30.0, "free": 0.0}, Path(sys.argv[1]), rank=3) as watchdog:
    for _ in range(4):  # each within its limit
        watchdog.enter("step")
        time.sleep(0.15)
    with watchdog.phase("save"):
        time.sleep(0.6)
    time.sleep(0.2)
    watchdog.enter("free")
    time.sleep(0.6)
    print("no limit was passed", flush=True)
    watchdog.enter("step")
    wait_for_ever()
print("unreachable")
"""


def test_a_hung_phase_ends_the_process_and_writes_its_stacks(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == HUNG and done.stdout == "no limit was passed\n", done.stderr
    assert time.monotonic() - started < 40
    (written,) = tmp_path.iterdir()
    text = written.read_text()
    assert written.name.endswith("_rank3.txt") and "rank 3: " in text and "s in phase step" in text
    assert "wait_for_ever" in text and "<module>" in text
    assert str(written) in done.stderr and "whose limit is 0 s" in done.stderr


def test_a_standard_error_that_is_no_file_does_not_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Watchdog({"step": 5.0}, tmp_path, rank=0) as watchdog:  # capsys replaces sys.stderr, as notebooks do
        watchdog.enter("step")


def test_without_limits_no_thread_watches_and_leaving_ends_it(tmp_path: Path) -> None:
    import threading

    with Watchdog({"step": 0.0}, tmp_path, rank=0) as watchdog:
        watchdog.enter("step")
        assert all(thread.name != "watchdog" for thread in threading.enumerate())
    with Watchdog({"step": 5.0}, tmp_path, rank=0) as watchdog:
        watchdog.enter("step")
        assert any(thread.name == "watchdog" for thread in threading.enumerate())
    assert all(thread.name != "watchdog" for thread in threading.enumerate())
