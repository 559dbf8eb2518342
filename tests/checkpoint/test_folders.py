"""Folders of checkpoints exist only when complete, and only old ones go."""

import shutil
from pathlib import Path

import pytest

from dla_train.checkpoint.errors import CheckpointError, DamagedError
from dla_train.checkpoint.folders import (
    checkpoint_folder,
    complete_steps,
    find_checkpoints,
    folders_set_aside,
    outdated_steps,
    remove_incomplete,
    remove_old,
    set_aside,
)
from dla_train.checkpoint.manifest import MARKER
from tests.checkpoint.small_runs import resumed_value, write_checkpoints


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with complete checkpoints of steps 1 to 3."""
    return write_checkpoints(tmp_path, 1, 2, 3)


def test_a_folder_without_its_marker_does_not_count_and_is_cleaned_away(root: Path) -> None:
    (checkpoint_folder(root, 3) / MARKER).unlink()
    (root / "step_00000004.tmp").mkdir()
    (root / "step_00000001.replaced").mkdir()
    (root / "notes").mkdir()
    (root / "step_00000009.damaged").mkdir()
    assert [found.step for found in find_checkpoints(root)] == complete_steps(root) == [1, 2]  # nor is it a damaged one
    assert remove_incomplete(root) == ["step_00000001.replaced", "step_00000003", "step_00000004.tmp"]
    left = ["notes", "step_00000001", "step_00000002", "step_00000009.damaged"]
    assert sorted(path.name for path in root.iterdir()) == left


def test_a_truncated_file_makes_a_checkpoint_damaged_and_ignored_but_kept(root: Path) -> None:
    trainer = checkpoint_folder(root, 3) / "trainer.json"
    trainer.write_bytes(trainer.read_bytes()[:-1])
    assert complete_steps(root) == [1, 2]
    fault = find_checkpoints(root)[-1].fault
    assert isinstance(fault, DamagedError) and "step_00000003 is damaged: trainer.json has" in str(fault)
    assert remove_incomplete(root) == [] and checkpoint_folder(root, 3).is_dir()


@pytest.mark.parametrize(
    ("last", "every", "left"),
    [(0, 0, "123456"), (1, 0, "6"), (2, 0, "56"), (9, 0, "123456"), (1, 2, "246"), (2, 4, "456")],
)
def test_the_newest_are_kept_and_those_of_every_so_many_steps(last: int, every: int, left: str) -> None:
    steps = [1, 2, 3, 4, 5, 6]
    assert [step for step in steps if step not in outdated_steps(steps, last, every)] == [int(digit) for digit in left]


def test_deleting_old_ones_deletes_their_folders_and_never_counts_later_steps(root: Path) -> None:
    """A later step that was not resumed from must not push the checkpoint just written out of the kept ones."""
    assert remove_old(root, newest=2, keep_last=1, keep_every_steps=0) == [1]
    assert complete_steps(root) == [2, 3] and not checkpoint_folder(root, 1).exists()


def test_damaged_ones_are_set_aside_under_new_names_each_time(root: Path) -> None:
    assert set_aside(checkpoint_folder(root, 3)).name == "step_00000003.damaged"
    shutil.copytree(checkpoint_folder(root, 2), checkpoint_folder(root, 3))
    assert set_aside(checkpoint_folder(root, 3)).name == "step_00000003.damaged2"
    assert complete_steps(root) == [1, 2] and len(folders_set_aside(root)) == 2


def test_a_folder_with_another_steps_checkpoint_is_not_taken_for_its_own(root: Path, tmp_path: Path) -> None:
    checkpoint_folder(root, 2).rename(checkpoint_folder(root, 7))
    assert resumed_value(tmp_path) == (3, 3.0)


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints cannot be read: Not a directory"):
        find_checkpoints(tmp_path / "checkpoints")
    assert find_checkpoints(tmp_path / "absent") == []
