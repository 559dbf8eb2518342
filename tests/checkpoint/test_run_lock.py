"""One process trains in a run directory: live holders are respected, dead ones are not."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dla_train.checkpoint import run_lock
from dla_train.checkpoint.errors import RunDirectoryError
from dla_train.checkpoint.run_lock import LOCK_FILE, RunLock

HOLD = """
import sys, time
from pathlib import Path
from dla_train.checkpoint.run_lock import RunLock
RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path."""
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def write_lock(folder: Path, **changes: Any) -> Path:
    """The lock as this process would write it, with changes."""
    (folder / LOCK_FILE).write_text(json.dumps(run_lock.process_record(os.getpid()) | {"token": "x"} | changes))
    return folder / LOCK_FILE


def test_a_second_process_is_refused_while_the_first_lives_and_let_in_when_it_was_killed(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    before = (tmp_path / LOCK_FILE).read_bytes()
    with pytest.raises(RunDirectoryError, match=rf"is being trained by process {holder.pid} on .*; wait for it"):
        RunLock(tmp_path)
    assert (tmp_path / LOCK_FILE).read_bytes() == before
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and left as a zombie
    lock = RunLock(tmp_path)
    lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_that_was_given_to_another_process_is_no_holder(tmp_path: Path) -> None:
    write_lock(tmp_path, started="1")
    RunLock(tmp_path).release()


def test_the_same_process_cannot_train_twice_in_a_directory(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(RunDirectoryError, match=f"is being trained by process {os.getpid()}"):
        RunLock(tmp_path)
    lock.release()
    RunLock(tmp_path).release()


@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"processes": "another container"}, {"pid": None, "host": 3}])
def test_a_lock_of_another_host_is_taken_over_only_after_it_lay_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: dict[str, Any]
) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.3)
    monkeypatch.setattr(run_lock, "LOOK_SECONDS", 0.01)
    path = write_lock(tmp_path, **elsewhere)
    beat = threading.Timer(0.1, lambda: os.utime(path))
    beat.start()
    with pytest.raises(RunDirectoryError, match="is being trained by"):
        RunLock(tmp_path)
    beat.join()
    RunLock(tmp_path).release()


def test_a_lock_of_another_host_that_is_given_back_while_it_is_watched_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 20.0)
    monkeypatch.setattr(run_lock, "LOOK_SECONDS", 0.01)
    path = write_lock(tmp_path, host="node7")
    threading.Timer(0.1, path.unlink).start()
    RunLock(tmp_path).release()


def test_a_holder_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.01)
    lock = RunLock(tmp_path)
    os.utime(lock.path, (1, 1))
    touched = threading.Event()
    while not touched.wait(0.01):
        if lock.path.stat().st_mtime > 1:
            touched.set()
    lock.release()


def test_a_lock_that_was_taken_over_is_not_kept_alive_by_its_first_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.01)
    lock, looked = RunLock(tmp_path), threading.Event()
    (tmp_path / LOCK_FILE).write_text("another's")
    os.utime(lock.path, (1, 1))
    ours = lock._is_ours
    monkeypatch.setattr(lock, "_is_ours", lambda: (looked.set(), ours())[1])
    for _ in range(3):  # the second look is certain to follow a whole round
        looked.clear()
        assert looked.wait(10)
    assert lock.path.stat().st_mtime == 1
    lock.release()


def test_of_many_that_find_a_dead_holders_lock_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "LOOK_SECONDS", 0.01)
    for _ in range(20):
        write_lock(tmp_path, started="1")
        got: list[RunLock] = []
        refused: list[str] = []
        start = threading.Barrier(6)

        def attempt(start: threading.Barrier = start, got: Any = got, refused: Any = refused) -> None:
            start.wait()
            try:
                got.append(RunLock(tmp_path))
            except RunDirectoryError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=attempt) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        holders = [lock for lock in got if lock._is_ours()]
        assert len(holders) == 1 and len(got) + len(refused) == 6
        for lock in got:
            lock.release()
        assert list(tmp_path.iterdir()) == []


def test_a_rival_that_was_faster_gets_its_lock_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found the dead holder; the rival took the lock over between this one's look and its renaming."""
    write_lock(tmp_path, started="1")
    alive, rival = run_lock._alive, list[bytes]()

    def slow_look(path: Path, seen: bytes) -> bool:
        if rival:
            return alive(path, seen)
        rival.append(write_lock(tmp_path, token="rival").read_bytes())
        return False

    monkeypatch.setattr(run_lock, "_alive", slow_look)
    with pytest.raises(RunDirectoryError, match="is being trained by"):
        RunLock(tmp_path)
    assert (tmp_path / LOCK_FILE).read_bytes() == rival[0]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"host": {}, "pid": 1e99}', b"[" * 100_000])
def test_a_lock_file_of_nonsense_is_watched_and_then_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "LOOK_SECONDS", 0.01)
    (tmp_path / LOCK_FILE).write_bytes(content)
    RunLock(tmp_path).release()


def test_a_lock_that_is_no_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(RunDirectoryError, match=r"run.lock is no plain file; remove it"):
        RunLock(tmp_path)
