"""The command: one line a check, its exit code, JSON; versions and devices; and what dla-launch does with it."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dla_train.config import Config
from dla_train.doctor.command import run
from dla_train.doctor.findings import FAILED, OK, WARNING
from dla_train.doctor.machine import check_devices, check_versions
from dla_train.doctor.settings import check_memory
from dla_train.launch.command import main as launch

Tiny = Callable[..., Config]


def test_every_check_is_one_line_and_the_exit_code_tells(
    words: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["doctor.disk_mb=1", "doctor.reduce_mb=1", f"doctor.json={tmp_path}/found.json"]
    assert run([*words, *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["settings", "versions", "devices", "tokenizer", "data", "run_dir", "room", "disk", "ranks"]
    assert [line.split()[1] for line in lines] == names
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failed"] is False and [item["check"] for item in found["findings"]] == names
    (corpus / "tiny_train.bin").unlink()
    assert run([*words, "doctor.disk_mb=0", "doctor.json=-"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] and [i["check"] for i in found["findings"] if i["state"] == FAILED] == ["data"]


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("doctor.disks=1", "doctor.disks is not an option; choose from world_size, disk_mb"),
        ("doctor.disk_mb=many", "doctor.disk_mb=many is not a whole number"),
        ("doctor.reduce_mb=0", "doctor.reduce_mb=0"),
        ("train.stepz=3", "did you mean train.steps?"),
    ],
)
def test_a_wrong_word_is_a_mistake(words: list[str], word: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*words, word]) == 2
    assert part in capsys.readouterr().err


def test_settings_can_be_checked_for_more_ranks_than_there_are(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "doctor.world_size=3"]) == 1
    assert capsys.readouterr().out.startswith("FAILED   settings   train.global_batch_rows=8 is not a multiple")


def test_a_package_that_is_absent_or_too_old_is_named_with_the_command_that_mends_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise metadata.PackageNotFoundError(name)
        return "2.5.1" if name == "torch" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    requires = ["torch>=2.6", "deepspeed>=0.17; extra == 'deepspeed'"]
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    told = [finding.what for finding in check_versions(tiny("engine=deepspeed")) if finding.state == FAILED]
    assert len(told) == 2 and "torch 2.5.1 is not >=2.6; run `pip install 'torch>=2.6'`" in told
    assert any("deepspeed is not installed, which engine.name=deepspeed needs" in what for what in told)
    assert len(check_versions(tiny())) == 1  # a run on the local engine needs no deepspeed


def test_a_device_that_is_not_there_is_found(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = check_devices(tiny("train.device=cuda"), 1)
    assert finding.state == FAILED and "set train.device=cpu" in finding.what
    assert check_devices(tiny(), 2).state == OK


def test_more_ranks_than_devices_are_found(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = {"is_available": lambda: True, "device_count": lambda: 2, "get_device_name": lambda: "GPU"}
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    finding = check_devices(tiny(), 3)
    assert finding.state == FAILED and "fewer than the 3 ranks" in finding.what


@pytest.mark.parametrize(("size", "state"), [(10**6, WARNING), (10**11, OK)])
def test_memory_that_a_device_does_not_have_is_a_warning(tiny: Tiny, size: int, state: str) -> None:
    (finding,) = check_memory(tiny(), 1, size)
    assert finding.state == state and ("train.recompute=true" in finding.what) == (state == WARNING)


def test_dla_launch_starts_nothing_that_would_fail(
    words: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "tiny_train.bin").unlink()
    two = ["launcher.ranks_per_node=2", "train.micro_batch_rows=2"]
    slurm = ["launcher=slurm", "launcher.cpus_per_rank=1"]
    for launcher in (two, [*two, *slurm]):
        assert launch([*launcher, *words]) == 2
        told = capsys.readouterr().err
        assert "nothing is started" in told and "tiny_train.bin" in told and "launcher.preflight=false" in told
        assert not (tmp_path / "run").exists()


def test_dla_launch_runs_the_doctor_on_the_ranks(
    words: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["launcher.program=doctor", "doctor.disk_mb=1"]
    slurm = ["launcher=slurm", "launcher.ranks_per_node=1"]
    assert launch(["--dry-run", *own, *words]) == 0
    line = capsys.readouterr().out
    assert "--max-restarts=0" in line and "-m dla_train.doctor.command doctor.disk_mb=1" in line
    assert launch(["--dry-run", *slurm, *own, *words]) == 0
    script = capsys.readouterr().out
    assert "-m dla_train.doctor.command doctor.disk_mb=1" in script and "--max-restarts=0" in script
    assert f"status={tmp_path}/run/launches/" in script  # the run's own status.json stays
