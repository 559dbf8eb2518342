"""Judges every step's loss and gradient: go on, return to the last checkpoint, or give up.

A step whose gradient is not finite changes nothing (the engine skips it), which a few times in a row is put up with. A
spike is a loss far above its running median, in units of the median distance from it: both ignore the spikes
themselves. A few spikes in a row mean that the weights are damaged: skipping more would not help, going back and past
the data that led there does (PaLM, arXiv 2204.02311, section 5.1).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from dla_train.config import ResilienceConfig

SMALLEST_DEVIATION = 1e-3
"""Least deviation of the loss, in nats, so that a constant loss makes no spike of rounding."""
LEAST_KNOWN = 20
"""Losses that must be known before one can be called a spike."""


@dataclass(frozen=True)
class Judgement:
    """What is to be done after a step."""

    rewind: bool = False
    """Return to the last checkpoint and pass over the data of the steps from `first_bad` on."""
    first_bad: int = 0
    """The first step of the row that led here."""
    reason: str = ""


class Guard:
    """Judges the steps of one start, in order; all ranks feed it the same numbers."""

    def __init__(self, config: ResilienceConfig, losses: Iterable[float] = ()) -> None:
        """`losses`: those of an earlier guard, so that a resumed run judges as one that was not stopped."""
        self._config = config
        self._losses: deque[float] = deque(losses, maxlen=config.spike_window_steps)
        self._skipped, self._spikes = 0, 0

    @property
    def losses(self) -> tuple[float, ...]:
        """What spikes are told by, oldest first."""
        return tuple(self._losses)

    @property
    def wants_losses(self) -> bool:
        """Whether every step's loss must be known, over all ranks."""
        return self._config.spike_deviations > 0

    @property
    def doubts(self) -> bool:
        """Whether the last step was a bad one: what a checkpoint would hold may have to be given up."""
        return self._skipped > 0 or self._spikes > 0

    def judge(self, step: int, loss: float | None, *, skipped: bool) -> Judgement:
        """After `step`: `loss` in nats per token over all ranks (None where it is not wanted)."""
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped > self._config.max_skipped_steps:
            what = f"the gradients of {self._skipped} steps in a row are not finite"
            return Judgement(True, step - self._skipped + 1, what)
        if loss is None or skipped or not self.wants_losses:
            return Judgement()
        spike, high = self._is_spike(loss)
        self._spikes = self._spikes + 1 if spike else 0
        if self._spikes >= self._config.spike_patience_steps:
            what = f"{self._spikes} losses in a row are above {high:.4f}, the last one {loss:.4f}"
            return Judgement(True, step - self._spikes + 1, what)
        if not spike:
            self._losses.append(loss)
        return Judgement()

    def _is_spike(self, loss: float) -> tuple[bool, float]:
        """Whether `loss` is a spike, and the highest one that is not."""
        if len(self._losses) < min(LEAST_KNOWN, self._config.spike_window_steps):
            return False, math.inf
        middle = statistics.median(self._losses)
        deviation = statistics.median(abs(known - middle) for known in self._losses)
        high = middle + self._config.spike_deviations * max(deviation, SMALLEST_DEVIATION)
        return loss > high, high
