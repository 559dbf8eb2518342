"""Jobs of several ranks that can be hurt: forked from a process that has imported everything, so that a start takes a
tenth of a second instead of five.

A launcher process forks the ranks and, like torchrun, ends them all when one fails. It can be killed itself, which
leaves its ranks to themselves.
"""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 10.0
"""What ranks are given to end by themselves after one has failed."""


@dataclass
class Job:
    """A running job."""

    launcher: int
    """Its process."""
    ranks: list[int]
    """Their processes."""
    log: Path
    """What ranks wrote."""

    def wait(self, seconds: float) -> int | None:
        """Exit code of the launcher (the first failure's, negative for a signal), None if it runs after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.launcher, os.WNOHANG)
            if pid:
                return decoded(os.waitstatus_to_exitcode(status))
            time.sleep(0.005)
        return None

    def send(self, number: int, *, rank: int | None = None) -> None:
        """A signal to a rank, or to the launcher; one that has ended is left in peace."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.launcher if rank is None else self.ranks[rank], number)

    def send_all(self, number: int) -> None:
        """A signal to every rank, as a scheduler sends it."""
        for rank in range(len(self.ranks)):
            self.send(number, rank=rank)

    def alive(self) -> bool:
        """Whether any rank still runs; they are not children of this process."""
        return any(Path(f"/proc/{pid}/stat").exists() and state_of(pid) != "Z" for pid in self.ranks)


def start(job: Callable[[int], int], ranks: int, log: Path) -> Job:
    """Run `job(rank)` on every rank, in processes of their own, whose exit codes it returns."""
    read, write = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        os.close(read)
        os._exit(encoded(_launch(job, ranks, log, write)))
    os.close(write)
    with os.fdopen(read) as pipe:
        pids = [int(word) for word in pipe.read().split()]
    return Job(launcher, pids, log)


def _launch(job: Callable[[int], int], ranks: int, log: Path, write: int) -> int:
    port = free_port()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.close(write)
            _rank(job, rank, ranks, port, log)
        pids.append(pid)
    with os.fdopen(write, "w") as pipe:
        pipe.write(" ".join(map(str, pids)))
    return _watch(pids)


def _watch(pids: Sequence[int]) -> int:
    """The first code that is not 0; the other ranks are given a while and then killed."""
    running, first, deadline = set(pids), 0, float("inf")
    while running:
        for pid in sorted(running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                running.discard(pid)
                code = os.waitstatus_to_exitcode(status)
                if code and not first:
                    first, deadline = code, time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return first


def _rank(job: Callable[[int], int], rank: int, ranks: int, port: int, log: Path) -> None:
    """A rank's whole life, which does not return."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        code = job(rank)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def state_of(pid: int) -> str:
    """The state letter of /proc; "Z" is a process that ended and was not waited for, or one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


def encoded(code: int) -> int:
    """An exit code with signals as 128 + number, which a process can return."""
    return 128 - code if code < 0 else code


def decoded(code: int) -> int:
    """The other way round."""
    return 128 - code if 128 < code < 128 + 65 else code
