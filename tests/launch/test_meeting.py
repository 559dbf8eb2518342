"""Where machines meet: whose port it is, and what is refused before torchrun starts."""

import socket

import pytest

from dla_train.launch.command import main
from dla_train.launch.meeting import MeetingError, meet
from tests.faults.processes import free_port


def test_a_machine_that_owns_the_address_keeps_the_store() -> None:
    meeting = meet(f"127.0.0.1:{free_port()}")
    assert (meeting.keeps_store, meeting.address, meeting.interface) == (True, "127.0.0.1", "lo")
    assert "--rdzv-conf=is_host=1,join_timeout=9" in meeting.arguments(2, "tiny", 9)
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
