"""Signals that ask a run to stop: noted when they come, obeyed by all ranks at the end of the same step.

SIGTERM comes from schedulers and from torchrun, SIGINT from a keyboard, SIGUSR1 from SLURM's `--signal`, some time
before the limit. One request often arrives several times (from the scheduler to every process, again through torchrun,
as SIGTERM after SIGUSR1), so only SIGINT aborts when it is repeated; the others are followed by SIGKILL soon enough.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from dla_train.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_SECONDS = 1.0
"""A terminal and torchrun deliver one Ctrl-C twice; a person's second one comes later than this."""


class StopSignals:
    """Notes SIGNALS while it is entered. Nothing else changes: no exception is raised in the middle of a step."""

    def __init__(self) -> None:
        self._requested: signal.Signals | None = None
        self._first_interrupt = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, mesh: Mesh) -> str:
        """The signal by which the run is to stop now, by name, "" for none: the same on every rank. Collective."""
        number = int(mesh.max(self._requested or 0))
        return signal.Signals(number).name if number else ""

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._first_interrupt and now - self._first_interrupt > REPEAT_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._first_interrupt = self._first_interrupt or now
        if self._requested is None:
            self._requested = signal.Signals(number)
            again = "; once more aborts without saving" if number == signal.SIGINT else ""
            logger.warning("%s: the run stops and is saved after this step%s", self._requested.name, again)
