"""The sweep benchmark: it runs a sweep, and its page says what the points took and what they left."""

import json
from pathlib import Path

import pytest

from dla_train.bench import sweep
from dla_train.bench.__main__ import main
from tests.train.runs import TINY, write_corpus


def test_points_are_run_and_their_share_of_the_cores_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    file = tmp_path / "two.yaml"
    file.write_text("settings: [memory=dla]\naxes: {memory.tau: [0.7]}\nbaselines: {single: [memory=single]}\n")
    own = ["train.validation_batches=1", "train.device=cpu"]
    swept = [word for word in TINY if not word.startswith("name=")]
    monkeypatch.setattr(sweep, "SWEEP", (f"sweep={file}", *swept, *corpus, *own))
    monkeypatch.setattr(sweep, "prepare_stdlib_files", lambda *_: None)
    assert main(["sweep", f"--output={tmp_path}", "--steps=4", f"--keep={tmp_path}/kept"]) == 0
    assert (tmp_path / "kept/report.html").is_file()
    results = json.loads((tmp_path / "sweep_utilisation.json").read_text())
    use = results["use"]
    assert results["points"] == 2 and 0 < use["seconds"] < results["command_seconds"]
    assert use["cores_busy"] == pytest.approx(use["processor_seconds"] / use["seconds"] / use["cores"])
    assert 0 < use["cores_busy"] <= 1.05 and 0 <= use["idle"] < 1 and 0 <= use["others"] < 1
    page = (tmp_path / "sweep_utilisation.md").read_text()
    assert f"| {use['cores_busy']:.1%} |" in page and page in capfd.readouterr().out


@pytest.mark.parametrize(
    ("busy", "others", "said"), [(0.9, 0.05, "reached"), (0.8, 0.01, "**missed**"), (0.5, 0.4, "not to be judged")]
)
def test_a_missed_target_is_said_only_of_a_machine_that_nobody_else_used(busy: float, others: float, said: str) -> None:
    assert sweep.verdict({"cores_busy": busy, "others": others}).startswith(said)


def test_idle_ticks_are_those_of_nothing_to_do_and_of_waiting_for_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "KERNEL_COUNTS", tmp_path / "stat")
    (tmp_path / "stat").write_text("cpu  10 1 9 70 5 1 2 2 99 99\ncpu0 1 2 3\n")
    assert sweep.machine_counts() == (75, 100)
    assert sweep.idle_share((75, 100), (80, 200)) == 0.05
