"""Triton's interpreter with a GPU's rounding, where it has none or a wrong one (Triton up to 3.7.1).

bfloat16 lies there as bits in 16-bit integers: products multiply the bits, conversions from float32 cut off what they
should round, and those from integers take numbers for bits. Products of float32 in TF32 are exact there; a GPU drops
the last 13 bits of every factor. What a kernel computes in bfloat16 outside of products is still wrong: none does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16's bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(x: np.ndarray) -> np.ndarray:
    """bfloat16's bits of float32 numbers, to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 without its last 13 bits."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


@contextlib.contextmanager
def rounding_as_a_gpu() -> Iterator[None]:
    """Inside the block kernels convert to bfloat16 and multiply in bfloat16 and TF32 as a GPU does."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def rounded_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, most: Any) -> Any:
        factors = a.data, b.data
        if a.dtype.scalar == tl.bfloat16:
            factors = widened(a.data), widened(b.data)
        elif a.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
            factors = cut_to_tf32(a.data), cut_to_tf32(b.data)
        of = a.dtype.scalar if factors[0] is a.data else tl.float32
        return dot(self, Handle(factors[0], of), Handle(factors[1], of), d, precision, most)

    def rounded_cast(self: Any, x: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and x.dtype.scalar != tl.bfloat16:
            return Handle(narrowed(x.data.astype(np.float32)), tl.bfloat16)
        return cast(self, x, to)

    builder.create_dot, builder.cast_impl = rounded_dot, rounded_cast
    try:
        yield
    finally:
        builder.create_dot, builder.cast_impl = dot, cast
