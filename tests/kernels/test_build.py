"""Every kernel, compiled at its production shapes for both architectures on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

KERNELS = Path(__file__).parents[2] / "kernels"
WITHOUT_PRODUCTS = {  # kernels that multiply no matrices; every other one must use the matrix units
}
STACK_ALLOWED: dict[str, int] = {}
"""Bytes of stack by kernel, each with its reason."""


@pytest.fixture(scope="module", params=[80, 90])
def resources(request):
    """Compiled in a process of its own: the interpreter, which the other tests use, replaces the compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(KERNELS)}
    done = subprocess.run(
        [sys.executable, "-m", "dla_kernels.build_report", "--architecture", str(request.param)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def named(row):
    return f"{row['kernel']} of {row['layer']} for sm{row['architecture']}"


@pytest.mark.slow
def test_every_kernel_builds_without_spilling_and_fits_its_shared_memory(resources):
    from dla_kernels.build_report import SHARED_LIMIT_BYTES

    for row in resources:
        assert row["local_bytes"] == 0, named(row)
        assert row["stack_bytes"] <= STACK_ALLOWED.get(row["kernel"], 0), (named(row), row["stack_bytes"])
        assert row["shared_bytes"] <= SHARED_LIMIT_BYTES[row["architecture"]], (named(row), row["shared_bytes"])


@pytest.mark.slow
def test_every_kernel_that_multiplies_matrices_uses_the_matrix_units(resources):
    for row in resources:
        assert bool(row["matrix_instructions"]) != (row["kernel"] in WITHOUT_PRODUCTS), named(row)


@pytest.mark.slow
def test_every_kernel_of_the_tuning_table_is_built_and_none_besides(resources):
    """A kernel that no production layer launches would ship uncompiled."""
    from dla_kernels.tuning import TUNING

    built = {row["kernel"] for row in resources}
    tuned = {name.removesuffix("_erasing") for name in TUNING} - {"mixing_chunk"}
    assert built == tuned
