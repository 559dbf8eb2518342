"""Where machines meet: whose port it is, and what is refused before torchrun starts."""

import socket
from pathlib import Path

import pytest
import torch

from dla_train.checkpoint.run_lock import RunLock
from dla_train.launch.command import main
from dla_train.launch.meeting import MeetingError, meet
from tests.faults.processes import free_port
from tests.train.runs import TINY, run_python, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def words(corpus: list[str], tmp_path: Path) -> list[str]:
    """A run that two ranks can do."""
    return [*TINY, *corpus, "train.micro_batch_rows=2", f"run_dir={tmp_path}/run"]


def test_a_machine_that_owns_the_address_keeps_the_store() -> None:
    meeting = meet(f"127.0.0.1:{free_port()}")
    assert (meeting.keeps_store, meeting.address, meeting.interface) == (True, "127.0.0.1", "lo")
    assert "--rdzv-conf=is_host=1,join_timeout=9,read_timeout=9" in meeting.arguments(2, "tiny", 9)
    assert "--local-addr=127.0.0.1" in meeting.arguments(2, "tiny", 9)


def test_the_interface_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    meeting = meet(f"localhost:{free_port()}")
    assert meeting.environment() == {"GLOO_SOCKET_IFNAME": "lo"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert meeting.environment() == {}


def test_a_port_in_use_and_an_unknown_host_are_refused_with_the_mend(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        words = ["launcher.nodes=2", "launcher.ranks_per_node=1", f"launcher.endpoint={endpoint}", "--dry-run"]
        assert main([*words, "experiment=quickstart", "train.micro_batch_rows=1"]) == 2
        told = capsys.readouterr().err
        assert f"launcher.endpoint={endpoint} cannot be opened here: Address already in use" in told
        assert "choose another port" in told
    with pytest.raises(MeetingError, match="is not known here"):
        meet("no-such-host.invalid:29500")


def test_a_machine_that_waits_in_vain_says_for_what_and_ends(words: list[str]) -> None:
    place = [f"launcher.endpoint=127.0.0.1:{free_port()}", "launcher.nodes=2", "launcher.join_seconds=2"]
    done = run_python(["-m", "dla_train.launch.command", *place, "launcher.ranks_per_node=1", *words])
    assert done.returncode == 1 and "RendezvousTimeoutError" in done.stderr
    assert "2 machines meet at 127.0.0.1" in done.stdout and "within 2 s (launcher.join_seconds)" in done.stdout


def test_more_ranks_than_devices_are_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = {"is_available": lambda: True, "device_count": lambda: 1, "get_device_name": lambda: "GPU"}
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 7))
    assert main([*words, "launcher.ranks_per_node=2"]) == 2
    told = capsys.readouterr().err
    assert "fewer than the 2 ranks here" in told and "launcher.ranks_per_node" in told
    assert not (tmp_path / "run").exists()


def test_a_run_directory_in_use_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run")
    try:
        assert main([*words, "launcher.ranks_per_node=2"]) == 2
    finally:
        lock.release()
    assert "is being trained by another process" in capsys.readouterr().err
    assert not (tmp_path / "run/launches").exists()
