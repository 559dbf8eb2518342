"""How a thing is timed: events around one call on a flushed cache, several things in turn, medians with their range.

Turns matter more than repetitions: a clock that drifts while one arm is measured ten times makes a ratio wrong; timed
in turn, both arms of a ratio drift alike. The host is not hidden: a call that waits for its own launches costs that
time in training too.
"""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]
"""One call of what is measured; its result is dropped."""


def failure_types() -> tuple[type[Exception], ...]:
    """What a measured call may die of without ending the run: memory, a refused input, a kernel that does not build."""
    found: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, AttributeError, ImportError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return found
    return (*found, TritonError)


FAILURES = failure_types()


class Stopwatch:
    """Times single calls on one device, each after its caches were overwritten."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._scratch: Tensor | None = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._scratch = torch.empty(4 * cache, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def laps(self, runs: list[Run]) -> list[float]:
        """Milliseconds of each of `runs`, called one after another."""
        self.synchronize()
        if self._scratch is None:
            marks = [time.perf_counter()]
            for run in runs:
                run()
                marks.append(time.perf_counter())
            return [1e3 * (end - begin) for begin, end in zip(marks, marks[1:], strict=False)]
        self._scratch.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
        events[0].record()
        for run, event in zip(runs, events[1:], strict=True):
            run()
            event.record()
        events[-1].synchronize()
        return [begin.elapsed_time(end) for begin, end in zip(events, events[1:], strict=False)]

    def milliseconds(self, run: Run) -> float:
        """Milliseconds of one call."""
        return self.laps([run])[0]

    def peak_bytes(self, run: Run) -> int | None:
        """Most memory allocated during one call beyond what was allocated before it; None off the GPU."""
        if self.device.type != "cuda":
            run()
            return None
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def release(self) -> None:
        """Give back what a failed call left behind; a broken CUDA context has nothing to give."""
        gc.collect()
        if self.device.type == "cuda":
            outcome(torch.cuda.empty_cache)


def summary(rounds: list[float]) -> dict[str, Any]:
    """Median, least and most of some numbers, and the numbers."""
    return {"median": statistics.median(rounds), "least": min(rounds), "most": max(rounds), "rounds": rounds}


@dataclass
class Case:
    """One thing of a comparison: what to call, and the record its numbers go into."""

    run: Run
    record: dict[str, Any]
    own_bytes: int = 0
    """Size of its inputs, which lie in memory before it is called: added to its peak."""
    rounds: list[float] = field(default_factory=list)


def measure_in_turn(
    cases: list[Case], rounds: int, stopwatch: Stopwatch, *, after: Run = lambda: None, hurry: Callable[[], bool]
) -> None:
    """Fill the record of every case: status, peak_bytes, milliseconds.

    Two calls of each to warm up (the second is the peak's), then one call each a round. A case that fails is recorded
    as `out_of_memory` or `failed` with its reason, and the others go on. `after` is called whenever a record changed;
    once `hurry` says so, no further case (`left_out`) and no further round begins.
    """
    for case in cases:
        if hurry():
            case.record["status"] = "left_out"
            continue

        def warm_up(case: Case = case) -> None:
            case.run()
            peak = stopwatch.peak_bytes(case.run)
            case.record["peak_bytes"] = None if peak is None else peak + case.own_bytes

        _attempt(case.record, stopwatch, warm_up)
        after()
    for number in range(rounds):
        if number and hurry():
            break
        for case in cases:
            if case.record["status"] == "ok":

                def turn(case: Case = case) -> None:
                    case.rounds.append(stopwatch.milliseconds(case.run))
                    case.record["milliseconds"] = summary(case.rounds)

                _attempt(case.record, stopwatch, turn)
        after()


def _attempt(record: dict[str, Any], stopwatch: Stopwatch, run: Run) -> None:
    status, detail = outcome(run)
    record["status"] = status
    if detail:
        record["detail"] = detail
        stopwatch.release()


def outcome(run: Run) -> tuple[str, str]:
    """(`ok`, ""), (`out_of_memory`, reason) or (`failed`, reason) of one call."""
    try:
        run()
    except torch.OutOfMemoryError as error:
        return "out_of_memory", brief(error)
    except FAILURES as error:
        return "failed", brief(error)
    return "ok", ""


def brief(error: Exception) -> str:
    """Type and message of an error, for a record; of a long message the first line and the last."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    shown = lines if len(lines) == 1 else [lines[0][:200], lines[-1]]
    return f"{type(error).__name__}: {' ... '.join(shown)}"[:500]


def is_lost(device: torch.device) -> bool:
    """Whether an earlier failure broke the CUDA context, after which every call of this process fails."""
    if device.type != "cuda":
        return False
    return outcome(lambda: torch.zeros(1, device=device).cpu())[0] == "failed"


def kernel_times(device: torch.device, run: Run) -> list[dict[str, Any]]:
    """What one call spends its time in, longest first: [{name, milliseconds, calls}], operators on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = []
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            found.append({"name": event.key, "milliseconds": microseconds / 1e3, "calls": event.count})
    return sorted(found, key=lambda kernel: -kernel["milliseconds"])


def matrix_rate(stopwatch: Stopwatch, *, size: int, repeats: int = 10) -> dict[str, Any]:
    """TFLOP/s of a square bf16 product of random numbers: what the device's matrix units give a plain torch.matmul."""
    generator = torch.Generator(stopwatch.device).manual_seed(0)
    a, b = (
        torch.randn(size, size, generator=generator, device=stopwatch.device, dtype=torch.float32).bfloat16()
        for _ in range(2)
    )
    for _ in range(3):
        a @ b
    rates = [2 * size**3 / stopwatch.milliseconds(lambda: a @ b) / 1e9 for _ in range(repeats)]
    return {"size": size, "tflops": summary(rates)}


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers are measured on."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "clocks": clocks(),
        }
    return found


QUERIED = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
"""What `clocks` reads: MHz, watts and degrees Celsius."""


def clocks() -> Mapping[str, str] | str:
    """Clocks, power and temperature of the first GPU as nvidia-smi states them, or why they are unknown."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return brief(error)
    return dict(zip(QUERIED, (value.strip() for value in done.stdout.split(",")), strict=False))


def run_at_once(commands: list[list[str]], seconds: float) -> dict[str, int]:
    """Run processes side by side for at most `seconds`; how many there were, failed, and were stopped."""
    ends = time.monotonic() + seconds
    running = [subprocess.Popen(command) for command in commands]
    stopped = 0
    for process in running:
        try:
            process.wait(timeout=max(0.1, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            stopped += 1
    failed = sum(process.returncode != 0 for process in running) - stopped
    return {"processes": len(running), "failed": failed, "stopped": stopped}
