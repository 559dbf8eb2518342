"""Checkpoints changed at random end in a typed error or a correct load; `python -m tests.checkpoint.fuzz` is longer."""

import json

from tests.train.runs import run_python


def test_no_changed_checkpoint_crashes_hangs_or_takes_memory() -> None:
    done = run_python(["-m", "tests.checkpoint.fuzz", "--count", "300"], timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) == 300
    assert outcomes["CheckpointError"] > 100 and outcomes["loaded"] > 5
