"""Triton's interpreter without its four long waits; what it computes stays the same to the last bit.

Half of an interpreted test is spent on them: a table of types made anew for every value, every name of the language
looked at anew for every call of a device function, sums computed once more to see whether they overflow (and then not
looked at, for that is for debugging), and scans that walk over single numbers. tests/kernels/test_interpreter.py
compares each replacement with what it replaces.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

names_of_builtins: dict[Any, list[str]] = {}
"""Of every module or class of the language, the names that the interpreter replaces."""


_of_scalar = functools.cache(interpreter._get_np_dtype)


def type_of_numbers(triton_type: Any) -> np.dtype[Any]:
    """`interpreter._get_np_dtype`, which makes its table anew for every value."""
    scalar = triton_type.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _of_scalar(scalar)


def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """`interpreter._patch_builtin`, which asks every member of the package anew whether it is a builtin."""
    if package not in names_of_builtins:
        names_of_builtins[package] = [name for name in dir(package) if tl.core.is_builtin(getattr(package, name, None))]
    for name in names_of_builtins[package]:
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # not where a kernel calls a function, for then it is replaced already
            interpreter._patch_attr(package, name, member, builder, scope)


def scan_by_slices(self: Any, inputs: Any) -> list[Any]:
    """`ScanOps.generic_scan`, which combines single numbers: here whole slices along the axis, one after the other."""
    scanned = [np.zeros_like(x.handle.data) for x in inputs]

    def slices(arrays: Any, index: int) -> tuple[Any, ...]:
        taken = (np.take(array, index, axis=self.axis) for array in arrays)
        return tuple(self.to_tensor(array, x.dtype) for array, x in zip(taken, inputs, strict=True))

    for index in range(scanned[0].shape[self.axis]):
        found = slices([x.handle.data for x in inputs], index)
        if index > 0:
            found = self.combine_fn.fn(*slices(scanned, index - 1), *found)
            found = found if isinstance(found, tuple) else (found,)
        for array, value in zip(scanned, found, strict=True):
            place = np.moveaxis(array, self.axis, 0)[index, ...]
            place[...] = np.reshape(value.handle.data, place.shape)
    return [self.to_tensor(array, x.dtype) for array, x in zip(scanned, inputs, strict=True)]


def hasten() -> None:
    """Replace the four in this process."""
    interpreter._get_np_dtype = type_of_numbers
    interpreter._patch_builtin = patch_builtin
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter.ScanOps.generic_scan = scan_by_slices
