"""Getting the programs of SLURM, with an apt-get that only notes what it is asked for."""

import os
from pathlib import Path

import pytest

from tests.slurm import packages

APT = """#!/bin/sh
echo "$*" | sed 's/.*Timeout=[0-9]* //' >> {folder}/asked
case "$*" in
*update) touch {folder}/lists;;
*install*) [ -e {folder}/lists ] || {{ echo "E: Unable to locate package slurm-wlm" >&2; exit 100; }}
    for name in {commands}; do printf '#!/bin/sh\\n' > {folder}/bin/$name; chmod +x {folder}/bin/$name; done;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of root without SLURM, whose apt-get has no lists yet."""
    (tmp_path / "bin").mkdir()
    for name in ("sh", "sed", "touch", "chmod", "printf"):
        (tmp_path / "bin" / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    apt = tmp_path / "bin/apt-get"
    apt.write_text(APT.format(folder=tmp_path, commands=" ".join(packages.COMMANDS)))
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    monkeypatch.setattr(packages, "SYSTEM_FOLDERS", "")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def asked(machine: Path) -> list[str]:
    file = machine / "asked"
    return file.read_text().splitlines() if file.exists() else []


INSTALL = "install --no-install-recommends slurm-wlm munge"


def test_absent_programs_are_installed_and_lists_are_fetched_only_if_that_fails(machine: Path) -> None:
    (machine / "lists").touch()
    assert packages.install() == "" and asked(machine) == [INSTALL]
    assert packages.install() == "" and asked(machine) == [INSTALL], "nothing is absent any more"


def test_without_lists_they_are_fetched_first(machine: Path) -> None:
    assert packages.missing().startswith("needs munged, slurmctld")
    assert packages.install() == "" and asked(machine) == [INSTALL, "update", INSTALL]
    assert packages.missing() == ""


def test_what_apt_said_is_told(machine: Path) -> None:
    (machine / "bin/touch").unlink()  # the lists cannot be fetched
    why = packages.install()
    assert why.startswith("needs munged") and why.endswith("E: Unable to locate package slurm-wlm")


def test_nothing_is_installed_without_root_or_apt(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        assert packages.install() == "needs root, to start munge's and SLURM's daemons"
    assert asked(machine) == []
    (machine / "bin/apt-get").unlink()
    assert packages.install().endswith("(apt install slurm-wlm munge)")
