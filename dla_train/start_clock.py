"""Where the time between starting a run and its first step goes: said once, by rank 0, after that step.

The parts before this process are told by whoever started it, in the environment variable DLA_STARTED: `name=moment`,
separated by commas, moments in seconds of the Unix epoch; each part lasts until the next begins, the last until this
process began. Wall-clock time throughout, since no other clock is shared by processes.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

STARTED = "DLA_STARTED"


class StartClock:
    """Seconds by part of a start, in the order in which the parts came."""

    def __init__(self) -> None:
        """Begins now."""
        self.seconds: dict[str, float] = {}
        """The parts so far."""
        self._since = time.time()
        self._said = False

    @classmethod
    def of_process(cls) -> StartClock:
        """Begins with this process, or with what started it; the part until now is called `imports`."""
        clock, now = cls(), time.time()
        began = process_began() or now
        # torchrun's later starts of the same job were not launched just now
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        parts = _parts(os.environ.get(STARTED, "")) if first else []
        ends = [*(start for _, start in parts), began][1:]
        for (name, start), end in zip(parts, ends, strict=True):
            clock.seconds[name] = max(end - start, 0.0)
        clock.seconds["imports"] = max(now - began, 0.0)
        return clock

    def part(self, name: str) -> None:
        """What came since the last part is called `name`; parts of one name add up."""
        now = time.time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def report(self) -> str:
        """One line, the first time it is asked for; "" from then on."""
        if self._said:
            return ""
        self._said = True
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"first step done {sum(self.seconds.values()):.1f} s after the start: {parts}"


def process_began() -> float | None:
    """When this process began, in seconds of the Unix epoch, to 0.01 s; None where the system does not tell."""
    with contextlib.suppress(OSError, ValueError):
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19])
        up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
    return None


def starting(*parts: tuple[str, float]) -> dict[str, str]:
    """The environment that tells a process what came before it: (name, moment it began) each."""
    return {STARTED: ",".join(f"{name}={moment:.3f}" for name, moment in parts)}


def _parts(text: str) -> list[tuple[str, float]]:
    """What `starting` wrote; nothing where it was not that."""
    found = []
    with contextlib.suppress(ValueError):
        for name, _, moment in (part.rpartition("=") for part in text.split(",") if part):
            found.append((name, float(moment)))
    return found
