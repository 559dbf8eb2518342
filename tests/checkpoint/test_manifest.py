"""Every changed byte of a checkpoint is found before anything is loaded, and no name in it leads out of its folder."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dla_train.checkpoint.errors import CheckpointError, DamagedError
from dla_train.checkpoint.manifest import MANIFEST, MARKER, marker_text, write_hashed
from dla_train.checkpoint.stored import StoredCheckpoint
from tests.checkpoint.small_runs import errors_of, resumed_value, write_checkpoints

EVERY_FILE = (
    "COMPLETE",
    "manifest.json",
    "tensors/model-00000-000.safetensors",
    "tensors/optim-00000-000.safetensors",
    "tensors/rng-00000-000.safetensors",
    "trainer.json",
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    write_checkpoints(folder, 1, 2)
    return folder


@pytest.fixture
def run(two: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    shutil.copytree(two / "run", tmp_path / "run")
    return tmp_path


def newest(run: Path) -> Path:
    return run / "run/checkpoints/step_00000002"


def is_sound(folder: Path) -> bool:
    try:
        StoredCheckpoint(folder).verify()
    except DamagedError:
        return False
    return True


def test_the_files_are_those_of_this_test_and_sound(run: Path) -> None:
    names = {path.relative_to(newest(run)).as_posix() for path in newest(run).rglob("*") if path.is_file()}
    assert names == set(EVERY_FILE) and is_sound(newest(run))


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_flipped_bit_anywhere_in_a_file_is_found(run: Path, name: str) -> None:
    path = newest(run) / name
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 97)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        assert not is_sound(newest(run)), position
    path.write_bytes(content)
    assert is_sound(newest(run))


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_file_cut_short_or_lengthened_is_found(run: Path, name: str) -> None:
    path = newest(run) / name
    content = path.read_bytes()
    for length in {0, 1, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:length])
        assert not is_sound(newest(run)), length
    path.write_bytes(content + b"\n")
    assert not is_sound(newest(run))


@pytest.mark.parametrize("name", [name for name in EVERY_FILE if name != MARKER])
@pytest.mark.parametrize("damage", ["flip", "delete", "swap"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(
    run: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = newest(run) / name
    if damage == "flip":
        path.write_bytes(bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:])
    elif damage == "delete":
        path.unlink()
    else:
        shutil.copy(run / "run/checkpoints/step_00000001" / name, path)
        if name.split("/")[-1].startswith("rng"):
            path.write_bytes(path.read_bytes()[::-1])  # the two random states are equal
    assert resumed_value(run) == (1, 1.0)
    (message,) = errors_of(caplog.records)
    assert "step_00000002.damaged; an older checkpoint is tried" in message and Path(name).name in message
    assert (run / "run/checkpoints/step_00000002.damaged/COMPLETE").is_file()


def test_where_all_are_damaged_nothing_is_started_anew_and_nothing_is_lost(run: Path) -> None:
    for step in (1, 2):
        (run / f"run/checkpoints/step_0000000{step}/trainer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"):
        resumed_value(run)
    assert len(list((run / "run/checkpoints").glob("step_*.damaged/manifest.json"))) == 2


def test_the_marker_and_the_manifest_can_be_checked_without_this_program(run: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--status", MARKER], cwd=newest(run), check=True)
    manifest = json.loads((newest(run) / MANIFEST).read_text())
    for name, record in manifest["files"].items():
        assert hashlib.sha256((newest(run) / name).read_bytes()).hexdigest() == record["sha256"]


def sealed(folder: Path, manifest: dict[str, Any]) -> None:
    """Give a checkpoint another manifest and the marker that goes with it, as an attacker would."""
    content = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(content)
    (folder / MARKER).write_text(marker_text(hashlib.sha256(content).hexdigest()))


OUTSIDE = (
    "../secret",
    "/etc/hostname",
    "tensors/../../secret",
    "../step_00000001/trainer.json",
    "../step_00000001/tensors/model-00000-000.safetensors",
    "tensors/model-00000-000.safetensors/../../secret",
    "trainer.json\n",
    "tensors",
    "",
    "tensors/model-00000-000.pt",
    "run",
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_cannot_name_a_file_that_is_none_of_a_checkpoint(run: Path, name: str) -> None:
    secret = run / "run/checkpoints/secret"
    secret.write_bytes(b"x")
    manifest = json.loads((newest(run) / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    sealed(newest(run), manifest)
    with pytest.raises(DamagedError, match="which is no file of a checkpoint"):
        StoredCheckpoint(newest(run))


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_links_pipes_and_folders_are_not_read(run: Path, name: str, kind: str) -> None:
    path = newest(run) / name
    path.rename(run / "elsewhere")
    if kind == "link":
        path.symlink_to(run / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)  # opening it for reading would wait for ever
    else:
        path.mkdir()
    with pytest.raises(DamagedError, match="not a plain file"):
        StoredCheckpoint(newest(run))


def test_a_folder_of_tensors_that_is_a_link_is_not_followed(run: Path) -> None:
    (newest(run) / "tensors").rename(run / "elsewhere")
    (newest(run) / "tensors").symlink_to(run / "elsewhere")
    with pytest.raises(DamagedError, match="tensors is not a folder"):
        StoredCheckpoint(newest(run))


@pytest.mark.parametrize("size", [10**15, -1, 2**70, 1.5, True, "9", None])
def test_a_size_that_is_not_the_files_is_refused_before_anything_is_read(run: Path, size: object) -> None:
    manifest = json.loads((newest(run) / MANIFEST).read_text())
    manifest["files"][EVERY_FILE[2]]["bytes"] = size
    sealed(newest(run), manifest)
    with pytest.raises(DamagedError, match=r"bytes where|gives no size"):
        StoredCheckpoint(newest(run))


def test_the_first_layout_is_a_clear_error_and_no_damage(run: Path) -> None:
    (newest(run) / MARKER).write_text(json.dumps({"step": 2, "files": {}}))
    with pytest.raises(CheckpointError, match="has layout 1, this version reads 2") as caught:
        resumed_value(run)
    assert not isinstance(caught.value, DamagedError) and newest(run).is_dir()


def test_what_is_written_is_hashed_as_written_whatever_the_pieces(tmp_path: Path) -> None:
    pieces = [b"", b"a" * 10, memoryview(bytes(range(256))), os.urandom(9 * 2**20)]
    record = write_hashed(tmp_path / "file", pieces)
    content = (tmp_path / "file").read_bytes()
    assert content == b"".join(pieces)
    assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    with pytest.raises(FileExistsError):
        write_hashed(tmp_path / "file", pieces)
