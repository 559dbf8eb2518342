"""Which implementation of an operation runs, and how its Triton kernels are launched.

`recurrent` is the token loop (the definition), `torch` the chunkwise form in PyTorch, `triton` the same in kernels.
`None` picks triton on CUDA and torch elsewhere. A backend asked for by name is used or refused, never replaced: a
silent slow path costs a cluster a week. Every kernel is launched by `launch`, with the pinned settings of tuning.py:
no kernel is tuned while it runs, which would stall the first step and let two ranks compute differently.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dla_kernels.tuning import TUNING

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("triton", "torch", "recurrent")
DEFAULT_ON_CUDA = "triton"
"""What None means there; an exported model's copy of this file, which has no kernels, says torch."""


class BackendError(ValueError):
    """An operation was asked to run on a backend that does not exist or cannot serve these inputs."""


def resolve_backend(backend: str | None, *tensors: Tensor) -> str:
    """Name of the implementation to run on `tensors`: `backend` itself, or their device's default where it is None."""
    if backend is None:
        backend = DEFAULT_ON_CUDA if tensors[0].device.type == "cuda" else "torch"
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}; leave it None for the default")
    if backend == "triton":
        _check_triton(tensors)
    return backend


def _check_triton(tensors: tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            raise BackendError("backend='triton' does not run in float64; use backend='torch' or 'recurrent' there")
        if tensor.device.type != "cuda" and not interpreting() and _recording is None:
            raise BackendError(
                f"backend='triton' needs CUDA tensors, these are on {tensor.device}; use backend='torch', or set "
                "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
            )


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when Python started)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def default_chunk_size(device: torch.device, key_dim: int) -> int:
    """C where the caller names none: 64, which fills a GPU's matrix units; 32 for small keys on a CPU.

    A chunk costs about C^2 (K + V) in tables and S K V (C + K) in states: C near K balances them (measured on 2 cores,
    T = 2048: for K = 32 mixing is alike at both and planning 4 to 13% faster at 32; for K = 64 mixing is 14 to 20%
    faster at 64).
    """
    return 32 if device.type == "cpu" and key_dim <= 32 else 64


def mixing_chunk_size(plan_chunk: int, backend: str, operands: Tensor) -> int:
    """C of mixing where the caller names none: that of the plan, but tuning.py's in Triton on a GPU.

    Mixing passes over S states a chunk, planning over one, so a longer chunk pays there first. Operands in float32 are
    multiplied outside of the matrix units: a product of 128 x 128 there takes minutes to compile, so C is 64 at most.
    """
    if backend == "triton" and not interpreting():
        pinned = tuning("mixing_chunk", operands.device)["C"]
        return min(pinned, 64) if operands.dtype == torch.float32 else pinned
    return plan_chunk


@dataclass(frozen=True)
class Launch:
    """One recorded launch: everything that decides which machine code runs."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]


_recording: list[Launch] | None = None
_architecture = 90


@contextlib.contextmanager
def recording(architecture: int) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, with the settings of `architecture` (80, 90): for meta tensors.

    Results are left unwritten. `dla_kernels.build_report` compiles what is collected.
    """
    global _recording, _architecture
    before = _recording, _architecture
    _recording, _architecture = [], architecture
    try:
        yield _recording
    finally:
        _recording, _architecture = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run kernel[grid](*args, **constants) on the device of its first tensor; an empty grid runs nothing."""
    if _recording is not None:
        _recording.append(Launch(kernel, args, constants))
        return
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **constants)


_overrides: dict[str, dict[str, int]] = {}


@contextlib.contextmanager
def override_tuning(**kernels: dict[str, int]) -> Iterator[None]:
    """Replace pinned settings inside the block: override_tuning(sweep_states={"BV": 16, "num_warps": 4})."""
    before = dict(_overrides)
    for name, settings in kernels.items():
        if name not in TUNING:
            raise BackendError(f"{name!r} is no kernel of tuning.py; choose from {', '.join(sorted(TUNING))}")
        _overrides[name] = settings
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def tuning(kernel: str, device: torch.device) -> dict[str, int]:
    """Pinned settings of a kernel on `device`: block sizes by their constexpr names, num_warps and num_stages."""
    architecture = _architecture
    if device.type == "cuda":
        architecture = 90 if torch.cuda.get_device_capability(device) >= (9, 0) else 80
    settings = dict(TUNING[kernel][architecture])
    settings.update(_overrides.get(kernel, {}))
    return settings


def power_of_2(n: int, least: int = 1) -> int:
    """Smallest power of 2 that is at least `n` and `least` (matrix units need 16)."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies operands of `dtype`: exactly for float32, whose callers want 1e-5; 16 bits ignore it."""
    return "ieee" if dtype == torch.float32 else "tf32"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Marks functions that torch.compile leaves alone: they launch kernels by data that tracing cannot see."""

    untraced: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # Made when it is needed: the compiler takes seconds to import, which `import dla_kernels` must not.
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not untraced:
            untraced.append(torch.compiler.disable(function))
        return untraced[0](*args, **kwargs)

    return call
