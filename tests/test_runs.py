"""`dla-runs`: the state of a run is what it said and whether anybody is at it."""

import json
import os
from pathlib import Path

import pytest

from dla_train.checkpoint.run_lock import RunLock
from dla_train.resilience.exit_codes import write_status
from dla_train.runs import RunState, duration, find_runs, main, read_run, table
from tests.train.runs import run_python

CONFIG = "name: x\ntrain:\n  steps: 8\n  stop_at_step: null\n"


def make_run(folder: Path, state: str = "", step: int = 0, lines: list[dict[str, float]] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    if state:
        write_status(folder, state, step, None, "because" if state == "diverged" else "")
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    "said, held, state",
    [
        ("", False, "waiting"),
        ("", True, "starting"),
        ("running", True, "running"),
        ("running", False, "died"),
        ("stopped", False, "stopped"),
        ("stopped", True, "starting"),
        ("finished", False, "finished"),
        ("diverged", False, "diverged"),
    ],
)
def test_the_state_is_what_the_run_said_and_whether_a_process_holds_it(
    tmp_path: Path, said: str, held: bool, state: str
) -> None:
    run_dir = make_run(tmp_path / "run", said)
    lock = RunLock(run_dir) if held else None
    try:
        assert read_run(run_dir).state == state
    finally:
        if lock:
            lock.release()


def test_a_lock_of_a_dead_process_holds_nothing_and_one_of_another_host_while_it_is_touched(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", "running")
    lock = run_dir / "run.lock"
    there = {"host": "elsewhere", "processes": "", "pid": 1, "started": "1"}
    lock.write_text(json.dumps(there))
    assert read_run(run_dir).state == "running"
    os.utime(lock, (1e9, 1e9))
    assert read_run(run_dir).state == "died"
    lock.write_text("nonsense")
    os.utime(lock, (1e9, 1e9))
    assert read_run(run_dir).state == "died"


def test_numbers_are_the_last_ones_and_the_step_is_the_newest(tmp_path: Path) -> None:
    lines = [
        {"step": 4, "loss": 3.0, "tokens_per_second": 10.0},
        {"step": 4, "validation_loss": 2.5},
        {"step": 6, "loss": 2.0},
    ]
    run = read_run(make_run(tmp_path / "run", "running", 2, lines))
    assert (run.step, run.steps, run.loss, run.validation_loss, run.tokens_per_second) == (6, 8, 2.0, 2.5, 10.0)
    assert run.checkpoint is None and run.age_seconds is not None and run.age_seconds < 60


def test_a_run_that_was_started_again_to_stop_earlier_has_done_all_its_steps(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", "finished", 8)
    (run_dir / "config.yaml").write_text(CONFIG.replace("null", "3"))
    run = read_run(run_dir)
    assert (run.step, run.steps) == (8, 8) and " 8/8 " in table([run])


def test_runs_are_found_at_any_depth_and_not_inside_each_other(tmp_path: Path) -> None:
    for name in ("a/b/run1", "a/run2", "run3"):
        make_run(tmp_path / name)
    make_run(tmp_path / "run3/points/inner")
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs([tmp_path])]
    assert found == ["a/b/run1", "a/run2", "run3"]
    assert list(find_runs([tmp_path / "run3"])) == [tmp_path / "run3"]


@pytest.mark.parametrize("name, text", [("status.json", "{"), ("config.yaml", "a: [1"), ("metrics.jsonl", "{\n")])
def test_a_file_that_cannot_be_read_is_a_damaged_run_among_the_others(
    tmp_path: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "good", "finished", 8)
    (make_run(tmp_path / "hurt", "finished", 8) / name).write_text(text)
    assert main([str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "finished" in told[1] and "damaged" in told[2]


def test_json_is_json_also_of_numbers_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", "diverged", 3, [{"step": 3, "loss": float("nan")}])
    assert main([str(tmp_path), "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (run,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert run["loss"] is None and run["reason"] == "because" and run["state"] == "diverged"


def test_an_absent_folder_is_a_mistake_and_an_empty_one_is_not(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no runs there\n"


def test_the_table_lines_up() -> None:
    runs = [
        RunState("a", "running", 3, 8, 2.0, None, 12345.6, None, 5.0, ""),
        RunState("long/name", "diverged", 12, None, None, 3.25, None, 10, None, "loss is nan"),
    ]
    head, one, two = table(runs).splitlines()
    assert one.split() == ["a", "running", "3/8", "2.0000", "-", "12,346", "-", "5", "s"]
    assert two.split() == ["long/name", "diverged", "12", "-", "3.2500", "-", "10", "-", "loss", "is", "nan"]
    assert head.index("state") == one.index("running") == two.index("diverged")


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (7000, "1.9 h"), (86400 * 3, "3.0 d")]
)
def test_ages_are_in_the_unit_that_reads_best(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_looking_at_runs_does_not_wait_for_torch() -> None:
    """Its import takes seconds, on a cluster's file system many."""
    done = run_python(
        ["-c", "import sys, dla_train.runs; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"]
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
