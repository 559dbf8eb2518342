"""Every kernel, compiled at its production shapes for both architectures on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

KERNELS = Path(__file__).parents[2] / "kernels"
WITHOUT_PRODUCTS = {
    *("add_slot_weight_gradients", "affinity_scale", "boundary_lists", "capacity_walk", "chunk_decays"),
    *("content_weights", "content_weights_backward", "decays_backward", "drift_follow", "drift_guess"),
    *("gate_adjoints", "gate_gradients", "gate_weights", "gate_weights_backward", "rms_norm", "rms_norm_backward"),
    *("short_conv", "short_conv_backward", "slot_table", "slot_versions", "slot_weights_by_slot", "step_decide"),
    *("step_update", "token_deaths"),
}
"""Kernels that multiply no matrices; every other one must use the matrix units."""
STACK_ALLOWED = {
    # Chunks of 128 on sm90: one [C, C] float32 tile is 64 registers of a thread. Mixing moves half the bytes at 128,
    # which outweighs what these few stages spill (docs/performance.md).
    "gated_operators": 288,
    "gated_matrix_backward": 120,
    "gated_mixing_backward": 32,
    "gated_inputs": 24,
    "mamba2_scores_backward": 376,
    # A few words around a loop; no setting that avoids them in every layer.
    "mix_write_backward": 16,
    "affinity_query_gradient": 8,
    # On sm80 at 256 x 512 alone.
    "drift_gradients": 56,
}
"""Bytes of stack a thread may use, by kernel, with the reason."""


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
        fades_only = row["kernel"] == "sweep_states" and row["layer"].startswith("mamba2")
        expected = row["kernel"] not in WITHOUT_PRODUCTS and not fades_only
        assert bool(row["matrix_instructions"]) == expected, named(row)


@pytest.mark.slow
def test_every_kernel_of_the_tuning_table_is_built_and_none_besides(resources):
    """A kernel that no production layer launches would ship uncompiled."""
    from dla_kernels.tuning import TUNING

    built = {row["kernel"] for row in resources}
    tuned = {name.removesuffix("_erasing") for name in TUNING} - {"mixing_chunk"}
    assert built == tuned
