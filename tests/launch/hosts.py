"""Two hosts on this machine: network namespaces with an address each and a cable between them that can be cut.

`python -m tests.launch.hosts` says in one line why there can be none here, with exit code 1.
"""

import os
import shutil
import subprocess
import sys
import uuid
from dataclasses import dataclass


def missing() -> str:
    """What this machine lacks, "" for nothing."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs `ip` (apt install iproute2)"
    name = f"dla{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"needs network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


@dataclass
class Hosts:
    """Two namespaces and the pair of interfaces that joins them."""

    names: tuple[str, str]
    addresses = ("10.77.0.1", "10.77.0.2")

    @classmethod
    def make(cls) -> "Hosts":
        mark = uuid.uuid4().hex[:6]
        hosts = cls((f"dlaA{mark}", f"dlaB{mark}"))
        for name in hosts.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        first, second = hosts.names
        _ip("link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second)
        for name, address in zip(hosts.names, hosts.addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", name)
        hosts.cable(plugged=True)
        return hosts

    def cable(self, *, plugged: bool) -> None:
        """Plug the second host's cable in, or pull it out."""
        for name in self.names if plugged else self.names[1:]:
            _ip("-n", name, "link", "set", name, "up" if plugged else "down")

    def remove(self) -> None:
        """The interfaces go with their namespaces."""
        for name in self.names:
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(f"make test-hosts cannot run here: it {why}" if (why := missing()) else 0)
