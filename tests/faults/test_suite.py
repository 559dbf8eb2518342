"""The short form of the fault suite, of which `make test-faults` is the whole: runs are hurt and lose nothing."""

import json
from pathlib import Path

import pytest

from tests.train.runs import run_python


@pytest.mark.slow
def test_runs_that_are_hurt_end_as_those_that_nobody_hurt(tmp_path: Path) -> None:
    done = run_python(["-m", "tests.faults.suite", "--short", f"--output={tmp_path}"], timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    faults = json.loads((tmp_path / "faults.json").read_text())["faults"]
    once = {"runs": 1, "injected": 1, "survived": 1, "lost": 0}
    expected = dict.fromkeys(("SIGTERM", "flipped bit in model-", "weight not finite", "full disk"), once)
    expected["SIGKILL of a rank"] = once | {"injected": 3}
    assert {name: {key: row[key] for key in once} for name, row in faults.items()} == expected
    assert "| **all** | 5 |" in (tmp_path / "faults.md").read_text()
