"""What tests/interpreter.py replaces in Triton's interpreter gives the same numbers, bit for bit."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter import names_of_builtins, scan_by_slices

MAKEFILE = Path(__file__).parents[2] / "Makefile"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used where there is no GPU")


@pytest.fixture(scope="module")
def original():
    """The interpreter as it is installed, as a module of its own."""
    specification = importlib.util.find_spec("triton.runtime.interpreter")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.ScanOps.generic_scan is not interpreter.ScanOps.generic_scan
    return module


@triton.jit
def _then(keep_a, a, keep_b, b):
    return keep_a * keep_b, keep_b * a + b


@triton.jit
def _latest(flag_a, a, flag_b, b):
    return flag_a | flag_b, tl.where(flag_b != 0, b, a + b)


@pytest.mark.parametrize("combine", [_then, _latest])
@pytest.mark.parametrize(("shape", "axis"), [((16,), 0), ((4, 8), 0), ((4, 8), 1), ((2, 4, 8), 1)])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_of_slices_is_the_scan_of_numbers(original, combine, shape, axis, reverse):
    assert interpreter.ScanOps.generic_scan is scan_by_slices
    generator = np.random.default_rng(0)
    flags = generator.integers(0, 2, shape).astype(np.int32 if combine is _latest else np.float32)
    values = generator.standard_normal(shape).astype(np.float32)
    results = []
    for scan in (original.ScanOps.generic_scan, scan_by_slices):
        results.append(_scanned(scan, combine, (flags, values), axis, reverse))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert not np.array_equal(results[0][1], values)


def _scanned(scan, combine, arrays, axis, reverse):
    """Arrays that `scan` makes of `arrays`, inside a kernel's patched language."""
    ops = interpreter.ScanOps(axis, combine, reverse)
    ops.generic_scan = scan.__get__(ops)
    tensors = tuple(ops.to_tensor(array, tl.int32 if array.dtype == np.int32 else tl.float32) for array in arrays)
    scope = interpreter._patch_lang(combine.fn)
    try:
        return [tensor.handle.data for tensor in ops.apply(tensors)]
    finally:
        scope.restore()


def test_every_builtin_of_the_language_is_replaced_and_put_back(original):
    def members(package):
        return {name: getattr(package, name) for name in dir(package) if callable(getattr(package, name, None))}

    packages = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    before = [members(package) for package in packages]
    replaced = []
    for module in (original, interpreter):
        scope = module._patch_lang(_then.fn)
        replaced.append(
            [{n for n, m in members(p).items() if m is not b.get(n)} for p, b in zip(packages, before, strict=True)]
        )
        scope.restore()
        assert [members(package) for package in packages] == before
    assert replaced[0] == replaced[1] and len(replaced[0][0]) > 50
    assert set(names_of_builtins) >= {tl, tl.tensor, tl.math}


@pytest.mark.parametrize("dtype", [tl.float32, tl.bfloat16, tl.int1, tl.int64, tl.pointer_type(tl.float32)])
def test_types_of_numbers_are_those_of_the_table(original, dtype):
    for of in (dtype, tl.block_type(dtype, [4])):
        assert interpreter._get_np_dtype(of) == original._get_np_dtype(of)
        assert interpreter._get_np_dtype(of) is interpreter._get_np_dtype(of)


@triton.jit
def _sum(p_left, p_right, p_out):
    o_x = tl.arange(0, 4)
    tl.store(p_out + o_x, tl.load(p_left + o_x) + tl.load(p_right + o_x))


@pytest.mark.parametrize("looked_at", [False, True])
def test_sums_that_overflow_wrap_as_they_do_without_debugging(monkeypatch, looked_at):
    """The interpreter computes whether they overflow, and asserts it only where its option `debug` is set."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=looked_at))
    left, right = torch.tensor([[2**31 - 1, -(2**31), 5, 0], [1, -1, -7, 0]], dtype=torch.int32)
    found = torch.zeros(4, dtype=torch.int32)
    with np.errstate(over="ignore"):
        _sum[(1,)](left, right, found)
    assert found.tolist() == [-(2**31), 2**31 - 1, -2, 0]


def test_the_suite_on_the_cpu_sees_no_gpu():
    """Where there is one, kernels are given tensors on the CPU and no interpreter."""
    environment = re.search(r"^TEST_ENVIRONMENT := (.*)$", MAKEFILE.read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert "CUDA_VISIBLE_DEVICES=" in environment.split()


def test_the_tests_of_kernels_run_hastened():
    assert interpreter._patch_builtin.__module__ == "tests.interpreter" and "triton" in sys.modules
