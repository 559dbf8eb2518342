"""What the memories of a model do during training: counts of every step, and a closer look every so many steps."""

from dla_train.telemetry.counts import MemoryTelemetry
from dla_train.telemetry.look import MemoryLook

__all__ = ["MemoryLook", "MemoryTelemetry"]
