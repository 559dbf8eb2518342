"""Hydra's own multirun: each point is an ordinary run in a process of its own, whichever launcher plugin starts it."""

import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher

from dla_train import multirun
from dla_train.config_sentences import explain
from dla_train.hydra_app import run_application
from dla_train.multirun import fixed_keys, run_point
from dla_train.resilience.exit_codes import read_status
from tests.train.runs import TINY, numbers_of, run_python, write_corpus

BASE = [word for word in TINY if not word.startswith("name=")]
FILES = ["data.train=[x/y]", "data.validation=[x/z]", "data.tokenizer=none"]


def run(monkeypatch: pytest.MonkeyPatch, *words: str, multi: bool = True) -> tuple[int, list[tuple[list[str], int]]]:
    """The exit code of a multirun, and the words and ranks of the processes that it would start."""
    started: list[tuple[list[str], int]] = []
    monkeypatch.setattr(multirun, "run_to_end", lambda words, ranks, run_dir: started.append((list(words), ranks)))
    monkeypatch.setattr(sys, "argv", ["dla-train", *(["--multirun"] if multi else []), *words])
    point = functools.partial(run_point, fixed=fixed_keys(words))
    return run_application(lambda config: pytest.fail("trained in this process"), (), point), started


def folders(started: Sequence[tuple[list[str], int]]) -> list[str]:
    return sorted(words[-1].removeprefix("run_dir=").strip("'") for words, _ in started)


def test_every_point_has_a_folder_named_by_what_is_swept_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    swept = ["optim.lr=0.1,0.2", "memory=dla,single"]
    code, started = run(monkeypatch, *BASE, *FILES, "run_dir=all", *swept)  # BASE has an optim.lr too: the last counts
    assert code == 0
    names = [f"memory={memory}+optim.lr={lr}" for memory in ("dla", "single") for lr in ("0.1", "0.2")]
    assert folders(started) == [f"all/{name}" for name in names]
    words, ranks = started[0]
    assert ranks == 1 and words[:2] == ["--config-name", "config"] and {"memory=dla", "data.train=[x/y]"} <= set(words)
    code, started = run(monkeypatch, "experiment=quickstart,ladder_125m_mamba2_dla", "run_dir=all", "train.steps=500")
    assert code == 0
    assert folders(started) == ["all/experiment=ladder_125m_mamba2_dla", "all/experiment=quickstart"]


def test_a_point_has_the_configurations_of_the_multirun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/memory").mkdir(parents=True)
    (tmp_path / "mine/memory/odd.yaml").write_text("defaults: [dla]\ntau: 0.77\n")
    words = ["--config-dir", str(tmp_path / "mine"), *BASE, *FILES, "memory=odd", "optim.lr=0.1,0.2"]
    code, started = run(monkeypatch, *words)
    assert code == 0 and [point[:2] for point, _ in started] == [["--config-dir", str(tmp_path / "mine")]] * 2


def test_ranks_are_asked_for_as_of_the_shell_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script = (Path(multirun.__file__).parents[1] / "launch/torchrun.sh").read_text()
    assert f"${{{multirun.RANKS}:-" in script
    words = [*BASE, *FILES, "optim.lr=0.1,0.2"]
    code, started = run(monkeypatch, *words, "+hydra.job.env_set.RANKS='2'")
    assert code == 0 and [ranks for _, ranks in started] == [2, 2]
    monkeypatch.setenv("RANKS", "2")
    assert run(monkeypatch, *words, "train.micro_batch_rows=8") == (2, [])
    assert "2 data-parallel ranks" in capfd.readouterr().err
    monkeypatch.setenv("RANKS", "many")
    assert run(monkeypatch, *words) == (2, []) and "RANKS=many" in capfd.readouterr().err


def test_fixed_keys_are_those_with_one_value() -> None:
    words = [
        "--multirun",
        "-m",
        "a.b=1,2",
        "c=[1,2]",
        "d=choice(1,2)",
        "e=range(3)",
        "+f=x",
        "a.g='1,2'",
        "h=1",
        "h=1,2",
    ]
    assert fixed_keys(words) == {"c", "f", "a.g"}
    assert fixed_keys(["a=[1", "b=1"]) == frozenset(), "Hydra tells"


def test_a_launcher_that_is_not_installed_names_the_extra() -> None:
    missing = MissingConfigException("", missing_cfg_file="hydra/launcher/submitit_slurm", options=["basic"])
    told = "hydra/launcher=submitit_slurm needs the package hydra-submitit-launcher; pip install 'dla-train[sweep]'"
    assert explain(missing) == told
    other = MissingConfigException("", missing_cfg_file="hydra/launcher/slurm", options=["basic"])
    assert "choose from basic" in explain(other)


def test_several_tasks_of_a_cluster_for_one_point_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "optim.lr=0.1,0.2"]
    monkeypatch.setattr(LocalLauncher, "_EXECUTOR", "debug")  # submitit calls the program here
    code, started = run(monkeypatch, *BASE, *FILES, *place)
    assert code == 2 and not started and "hydra.launcher.tasks_per_node=2" in capfd.readouterr().err


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*BASE, *write_corpus(tmp_path_factory.mktemp("corpus")), "train.steps=4", "train.micro_batch_rows=2"]


def train(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_python(["-m", "dla_train.train", "--multirun", *words, f"run_dir={folder}/points"], cwd=folder)


def states(folder: Path) -> dict[str, str | None]:
    return {path.name: (read_status(path) or {}).get("state") for path in (folder / "points").iterdir()}


def test_a_point_that_fails_is_reported_and_the_others_are_ordinary_runs(words: list[str], tmp_path: Path) -> None:
    corpus = next(word for word in words if word.startswith("data.train="))
    done = train(tmp_path, *words, f"data.train=[nowhere],{corpus.partition('=')[2]}", "name=both")
    assert done.returncode == 1
    assert "dla-train: error: nowhere" in done.stderr, "what the run said"
    assert f"{tmp_path}/points/data.train=[nowhere] ended with exit code 2" in done.stderr.splitlines()[-1]
    (finished,) = [name for name, state in states(tmp_path).items() if state == "finished"]
    assert finished.endswith("tiny_train]")
    assert [step for (step,) in numbers_of(tmp_path / "points" / finished)] == [1, 2, 3, 4]


def test_joblib_trains_points_of_two_ranks_side_by_side(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKS", "2")
    done = train(tmp_path, *words, "optim.lr=1e-2,2e-2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("2 rank(s) on cpu") == 2
    assert states(tmp_path) == {"optim.lr=0.01": "finished", "optim.lr=0.02": "finished"}
