"""Saving in the background: consistent copies, complete or not at all, whatever fails at whatever moment."""

import builtins
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dla_train.checkpoint import saving
from dla_train.checkpoint.checkpointer import Checkpointer
from dla_train.checkpoint.errors import CheckpointError, RunDirectoryError
from dla_train.checkpoint.folders import complete_steps
from dla_train.checkpoint.manifest import read_small
from dla_train.checkpoint.run_lock import LOCK_FILE, RunLock
from dla_train.parallel.mesh import Mesh
from tests.checkpoint.small_runs import (
    DATA,
    SmallState,
    checkpointer_of,
    errors_of,
    make_config,
    resumed_value,
    write_checkpoints,
)

Patch = pytest.MonkeyPatch


@pytest.fixture
def held(monkeypatch: Patch) -> Iterator[threading.Event]:
    """Writing waits until the event is set."""
    go, write = threading.Event(), saving.write_tensor_files

    def waiting(*arguments: Any) -> Any:
        assert go.wait(20)
        return write(*arguments)

    monkeypatch.setattr(saving, "write_tensor_files", waiting)
    yield go
    go.set()


@contextmanager
def full_disk(patch: Patch, of: str = ".safetensors") -> Iterator[None]:
    """New files whose names hold `of` are written to a device that is always full."""

    def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if of in str(path) and "r" not in mode:
            return builtins.open("/dev/full", mode.replace("x", "w"), **options)
        return builtins.open(path, mode, *arguments, **options)

    with patch.context() as now:
        now.setattr("dla_train.checkpoint.manifest.open", opened, raising=False)
        now.setattr("dla_train.durable.open", opened, raising=False)
        yield


def test_training_goes_on_while_a_checkpoint_is_written_and_cannot_change_it(
    tmp_path: Path, held: threading.Event
) -> None:
    state = SmallState(1.0)
    with checkpointer_of(make_config(tmp_path)) as checkpointer:
        checkpointer.save(1, state, DATA)
        state.train(9.0)
        assert checkpointer.last_complete is None and complete_steps(checkpointer.root) == []
        held.set()
        assert checkpointer.finish() is None
        assert checkpointer.last_complete == 1
    assert resumed_value(tmp_path) == (1, 1.0)


def test_a_second_save_waits_for_the_first_and_says_what_that_cost(
    tmp_path: Path, held: threading.Event, caplog: pytest.LogCaptureFixture, monkeypatch: Patch
) -> None:
    caplog.set_level(logging.INFO, "dla_train")
    monkeypatch.setattr("dla_train.checkpoint.checkpointer.WAIT_SHOWN_SECONDS", 0.05)
    state, order = SmallState(1.0), []
    with checkpointer_of(make_config(tmp_path)) as checkpointer:
        checkpointer.save(1, state, DATA)
        threading.Timer(0.2, lambda: (order.append("first"), held.set())).start()
        state.train(2.0)
        checkpointer.save(2, state, DATA)
        order.append("second")
        assert checkpointer.last_complete == 1
    assert order == ["first", "second"] and complete_steps(checkpointer.root) == [1, 2]
    assert "s for the checkpoint of step 1" in caplog.text


def test_a_save_that_is_waited_for_or_not_asynchronous_is_complete_on_return(tmp_path: Path) -> None:
    with checkpointer_of(make_config(tmp_path)) as checkpointer:
        checkpointer.save(1, SmallState(), DATA, wait=True)
        assert complete_steps(checkpointer.root) == [1]
    with checkpointer_of(make_config(tmp_path, "checkpoint.asynchronous=false")) as checkpointer:
        checkpointer.save(2, SmallState(), DATA)
        assert complete_steps(checkpointer.root) == [1, 2]


def test_a_save_in_progress_is_completed_when_training_ends_with_an_error(
    tmp_path: Path, held: threading.Event
) -> None:
    threading.Timer(0.2, held.set).start()
    with pytest.raises(ArithmeticError), checkpointer_of(make_config(tmp_path)) as checkpointer:
        checkpointer.save(1, SmallState(), DATA)
        raise ArithmeticError
    assert complete_steps(checkpointer.root) == [1]


@pytest.mark.parametrize("of", [".safetensors", "optim-", "trainer.json", "part_", "manifest.json", "COMPLETE"])
def test_a_full_disk_costs_one_checkpoint_and_the_next_interval_tries_again(
    tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture, of: str
) -> None:
    state = SmallState(2.0)
    with checkpointer_of(make_config(tmp_path)) as checkpointer:
        checkpointer.save(2, state, DATA, wait=True)
        with full_disk(monkeypatch, of):
            state.train(4.0)
            checkpointer.save(4, state, DATA)
            assert "No space left on device" in str(checkpointer.finish())
        assert "step 4" in errors_of(caplog.records)[0] and "No space left" in errors_of(caplog.records)[0]
        assert complete_steps(checkpointer.root) == [2] and resumed_value(tmp_path) == (2, 2.0)
        state.train(6.0)
        checkpointer.save(6, state, DATA, wait=True)
        assert sorted(path.name for path in checkpointer.root.iterdir()) == ["step_00000002", "step_00000006"]
    assert resumed_value(tmp_path) == (6, 6.0)


def test_a_full_disk_at_the_last_save_is_one_typed_error(tmp_path: Path, monkeypatch: Patch) -> None:
    write_checkpoints(tmp_path, 2)
    with checkpointer_of(make_config(tmp_path)) as checkpointer, full_disk(monkeypatch):
        with pytest.raises(CheckpointError) as caught:
            checkpointer.save(8, SmallState(), DATA, wait=True)
        for words in ("step 8 is not written", "No space left on device", "older ones in", "the same command again"):
            assert words in str(caught.value)
        assert not list(checkpointer.root.rglob("*.safetensors.tmp"))
    assert complete_steps(checkpointer.root) == [2]


def test_a_failed_save_makes_room_by_deleting_what_it_had_written(tmp_path: Path, monkeypatch: Patch) -> None:
    with checkpointer_of(make_config(tmp_path)) as checkpointer, full_disk(monkeypatch, "optim-"):
        checkpointer.save(1, SmallState(), DATA)
        assert checkpointer._saving is not None and checkpointer._saving.written()
        assert not list(checkpointer.root.rglob("*.safetensors")), "at once, not at the next save"
        assert checkpointer.finish()
        assert list(checkpointer.root.iterdir()) == []


def test_a_failed_save_of_a_step_that_was_saved_before_leaves_the_older_one(tmp_path: Path, monkeypatch: Patch) -> None:
    write_checkpoints(tmp_path, 1)
    with checkpointer_of(make_config(tmp_path)) as checkpointer, full_disk(monkeypatch, "COMPLETE"):
        checkpointer.save(1, SmallState(7.0), DATA)
        assert "No space left on device" in str(checkpointer.finish())
    assert resumed_value(tmp_path) == (1, 1.0)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Not as root, whom no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_right_to_write_that_is_lost_during_the_run_is_a_message_and_at_the_end_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with checkpointer_of(make_config(tmp_path)) as checkpointer:
        checkpointer.save(1, SmallState(1.0), DATA, wait=True)
        checkpointer.root.chmod(0o555)
        with unprivileged():
            checkpointer.save(2, SmallState(2.0), DATA)
            assert "step 2 is not written" in errors_of(caplog.records)[0]
            assert "Permission denied" in errors_of(caplog.records)[0]
            with pytest.raises(CheckpointError, match="Permission denied"):
                checkpointer.save(3, SmallState(2.0), DATA, wait=True)
        checkpointer.root.chmod(0o755)
        assert complete_steps(checkpointer.root) == [1]
        checkpointer.save(4, SmallState(4.0), DATA, wait=True)
    assert resumed_value(tmp_path) == (4, 4.0)


def test_a_checkpoint_that_may_not_be_read_is_an_error_and_no_damage(tmp_path: Path) -> None:
    root = write_checkpoints(tmp_path, 1, 2)
    (root / "step_00000002").chmod(0o000)
    config = make_config(tmp_path)
    with unprivileged(), pytest.raises(CheckpointError), Mesh.start(config) as mesh:
        Checkpointer(config, mesh).resume(SmallState())
    with pytest.raises(CheckpointError, match="may not be read; give this user the right"), unprivileged():
        read_small(root / "step_00000002/COMPLETE")
    (root / "step_00000002").chmod(0o755)
    assert complete_steps(root) == [1, 2]


class PowerLossError(BaseException):
    """Nothing after it is done any more."""


OPERATIONS = ("fsync", "replace", "rename", "unlink", "mkdir")


def crash_at(patch: Patch, moment: int) -> Callable[[], int]:
    """Stop at the `moment`-th operation on the file system and do none after it; returns how many were asked for."""
    count = 0

    def limited(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > moment:
                raise PowerLossError
            return operation(*arguments, **options)

        return run

    for name in OPERATIONS:
        patch.setattr(os, name, limited(getattr(os, name)))
    return lambda: count


def save_and_lose_power(folder: Path, step: int, moment: int, patch: Patch) -> bool:
    """Whether the save was over before the power went."""
    state = SmallState(float(step))
    with Mesh.start(config := make_config(folder, "checkpoint.keep_last=1")) as mesh:
        checkpointer = Checkpointer(config, mesh)
        with patch.context() as now:
            crash_at(now, moment)
            try:
                checkpointer.save(step, state, DATA, wait=True)
            except PowerLossError:
                return False
            finally:
                checkpointer._pool.shutdown()
    return True


@pytest.mark.parametrize(
    "step", [2, pytest.param(1, marks=pytest.mark.slow)], ids=["a later step", "the same step again"]
)
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: Patch, step: int) -> None:
    """Before the commit the older one is resumed, after it the new one, and the next save finds a clean folder."""
    resumed = []
    for moment in range(200):
        folder = tmp_path / str(moment)
        folder.mkdir()
        write_checkpoints(folder, 1)
        over = save_and_lose_power(folder, step, moment, monkeypatch)
        found, value = resumed_value(folder)
        assert value == float(found or 0)
        resumed.append(found)
        write_checkpoints(folder, 3, overrides=("checkpoint.keep_last=1",))
        assert [path.name for path in (folder / "run/checkpoints").iterdir()] == ["step_00000003"]
        if over:
            break
    assert over and moment > 15
    assert set(resumed) == {1, step} and resumed == sorted(resumed)


def test_nothing_is_saved_after_another_process_took_the_run_over(tmp_path: Path, held: threading.Event) -> None:
    config = make_config(tmp_path)
    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run")
    with Mesh.start(config) as mesh, Checkpointer(config, mesh, lock) as checkpointer:
        checkpointer.save(1, SmallState(), DATA)
        (tmp_path / "run" / LOCK_FILE).write_text("{}")
        held.set()
        assert "is no longer this process's" in str(checkpointer.finish())
        with pytest.raises(RunDirectoryError, match="nothing more is saved here"):
            checkpointer.save(2, SmallState(), DATA)
    assert complete_steps(checkpointer.root) == []
    lock.release()
    assert (tmp_path / "run" / LOCK_FILE).read_text() == "{}"


def test_old_checkpoints_go_and_those_of_every_so_many_steps_stay(tmp_path: Path) -> None:
    kept = ("checkpoint.keep_last=2", "checkpoint.interval_steps=1", "checkpoint.keep_every_steps=4")
    root = write_checkpoints(tmp_path, *range(1, 8), overrides=kept)
    assert complete_steps(root) == [4, 6, 7]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_spoil_the_new_one(
    tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("not yours")

    write_checkpoints(tmp_path, 1)
    monkeypatch.setattr("dla_train.checkpoint.folders.remove_checkpoint", refused)
    root = write_checkpoints(tmp_path, 2, overrides=("checkpoint.keep_last=1",))
    assert complete_steps(root) == [1, 2] and "cannot be deleted: not yours" in caplog.text


def test_an_error_that_no_disk_explains_is_raised_as_it_is(tmp_path: Path, monkeypatch: Patch) -> None:
    def wrong(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(saving, "write_tensor_files", wrong)
    monkeypatch.setattr("dla_train.checkpoint.checkpointer.GRACE_SECONDS", 0.1)
    with checkpointer_of(make_config(tmp_path)) as checkpointer, pytest.raises(ZeroDivisionError):
        checkpointer.save(1, SmallState(), DATA, wait=True)


def test_the_random_state_goes_on_where_it_was(tmp_path: Path) -> None:
    config, state = make_config(tmp_path), SmallState(3.0)
    with checkpointer_of(config) as checkpointer:
        torch.manual_seed(3)
        torch.rand(5)
        checkpointer.save(4, state, DATA)
        expected = torch.rand(5)
        checkpointer.finish()
        torch.manual_seed(0)
        state.train(0.0)
        resumed = checkpointer.resume(state)
    assert resumed is not None and (resumed.step, resumed.data, state.steps) == (4, DATA, 4)
    assert torch.equal(torch.rand(5), expected) and state.value() == 3.0
