"""Numbers of a run about itself: how fast it is, where its time goes, how much memory it takes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dla_train.config import Config
from dla_train.models.cost import flops_per_token
from dla_train.parallel.mesh import Mesh

PHASES = ("data", "exchange", "forward", "backward", "step")
"""Timed parts of a training step; the rest of it is `other`. Ranks wait for one another in `exchange`, where they sum
counts and losses; what layers and gradients communicate is part of forward, backward and step."""

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10": 125.0, "V100": 125.0}
"""Dense bfloat16 peak (V100: float16) by part of the device's name, TFLOP/s; data sheets, SXM parts."""


class PhaseClock:
    """Seconds of each phase of a step. On CUDA the times are of the device only where `synchronize` is set.

    Steps follow one another without a gap: what the loop does after a step, such as writing its line, counts as `other`
    of the next one. `restart` leaves out what is no part of training (validation, checkpoints).
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self.synchronize = False
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._started = time.perf_counter()

    def restart(self) -> None:
        """Begin the next step now."""
        self._started = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the block to one of PHASES."""
        started = self._now()
        yield
        self._seconds[name] += self._now() - started

    def end_step(self) -> dict[str, float]:
        """Seconds of the step and its phases, and `overhead`: the share that is neither the model's nor exchanged."""
        now = self._now()
        total, self._started = now - self._started, now
        other = total - sum(self._seconds.values())
        model = sum(self._seconds[name] for name in ("exchange", "forward", "backward", "step"))
        times = {f"seconds_{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return {"seconds": total, **times, "seconds_other": other, "overhead": 1.0 - model / total}

    def _now(self) -> float:
        if self._cuda is not None and self.synchronize:
            torch.cuda.synchronize(self._cuda)
        return time.perf_counter()


class SpeedMeter:
    """Tokens a second between two log lines, MFU, and the phases of the last step."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._mesh = mesh
        self._peak = peak_tflops(config.logging.peak_tflops, mesh.device)
        self._flops = flops_per_token(config.model, config.memory, config.data.context_tokens).training
        self._tokens, self._seconds = 0, 0.0
        self._times: dict[str, float] = {}

    def add(self, tokens: int, times: dict[str, float]) -> None:
        """Count a step over `tokens` tokens (all ranks) whose PhaseClock read `times`."""
        self._tokens += tokens
        self._seconds += times["seconds"]
        self._times = times

    def read(self) -> dict[str, float]:
        """Numbers since the last call. Collective: memory is the largest of any rank."""
        speed = self._tokens / self._seconds
        self._tokens, self._seconds = 0, 0.0
        numbers = {"tokens_per_second": speed}
        if self._peak:
            numbers["mfu"] = model_flops_utilisation(speed, self._flops, self._peak, self._mesh.size)
        return numbers | {"memory_bytes": self._mesh.max(peak_memory_bytes(self._mesh.device))} | self._times


def peak_tflops(configured: float, device: torch.device) -> float | None:
    """TFLOP/s of one device: the configured one, else by the device's name, else None (then there is no MFU)."""
    if configured:
        return configured
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def model_flops_utilisation(tokens_per_second: float, flops_per_token: float, peak: float, devices: int) -> float:
    """Share of the devices' peak (TFLOP/s each) that useful training FLOPs take."""
    return tokens_per_second * flops_per_token / (peak * 1e12 * devices)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on CUDA, resident (whole process) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
