"""Where several machines meet without a batch system: torchrun's rendezvous at `launcher.endpoint`.

The machine that owns the endpoint's address keeps the store, and must be told so: torchrun compares names, which fails
wherever a name does not resolve to the address that others use. For the same reason each machine says which of its
addresses reaches the endpoint, and gloo which interface that is (it would take the one its own name resolves to,
often 127.0.1.1, and no other host could connect).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass

SIOCGIFADDR = 0x8915
"""ioctl of Linux: the IPv4 address of an interface."""


class MeetingError(RuntimeError):
    """The machines cannot meet at the endpoint."""


@dataclass(frozen=True)
class Meeting:
    """This machine's part."""

    endpoint: str
    """host:port, the same on all machines."""
    keeps_store: bool
    """Whether the endpoint is this machine."""
    address: str
    """By which others reach this machine."""
    interface: str
    """That has the address; "" where the system does not tell."""

    def arguments(self, nodes: int, name: str, join_seconds: int) -> list[str]:
        """For torchrun."""
        # read_timeout is also how long a machine waits for the store, whose own machine may start later
        waits = f"join_timeout={join_seconds},read_timeout={join_seconds}"
        store = f"is_host={int(self.keeps_store)},{waits}"
        return [
            *(f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={name}"),
            *(f"--rdzv-conf={store}", f"--local-addr={self.address}"),
        ]

    def environment(self) -> dict[str, str]:
        """For torchrun and the run; what the user has set stays."""
        if not self.interface or "GLOO_SOCKET_IFNAME" in os.environ:
            return {}
        return {"GLOO_SOCKET_IFNAME": self.interface}


def meet(endpoint: str) -> Meeting:
    """Look at the endpoint from this machine. Raises MeetingError: an unknown name, no way there, a port in use."""
    host, _, port = endpoint.rpartition(":")
    try:
        there = socket.gethostbyname(host)
    except OSError as error:
        mend = "name the first machine by an address or a name that all machines know"
        raise MeetingError(f"launcher.endpoint={endpoint}: {host} is not known here ({error}); {mend}") from error
    keeps = _is_here(there, int(port), endpoint)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((there, int(port)))  # sends nothing
            own = str(probe.getsockname()[0])
    except OSError as error:
        mend = "check the network between them"
        raise MeetingError(f"launcher.endpoint={endpoint}: no way there from this machine ({error}); {mend}") from error
    return Meeting(endpoint, keeps, own, _interface(own))


def _is_here(address: str, port: int, endpoint: str) -> bool:
    """Whether `address` is this machine's; then its port must be free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return False
            mend = "choose another port on all machines, or end the process that has it (`ss -ltnp` shows it)"
            rule = f"launcher.endpoint={endpoint} cannot be opened here"
            raise MeetingError(f"{rule}: {error.strerror}; {mend}") from error
    return True


def _interface(address: str) -> str:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                asked = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                if socket.inet_ntoa(asked[20:24]) == address:
                    return name
    return ""
