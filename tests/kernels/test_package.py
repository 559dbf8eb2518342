"""The package on its own: what it imports and what it exports."""

import subprocess
import sys
from pathlib import Path

import dla_kernels as dk

KERNELS = Path(__file__).parents[2] / "kernels"

PROBE = """
import sys, torch
before = {name.split(".")[0] for name in sys.modules}
import dla_kernels
print(*sorted({name.split(".")[0] for name in sys.modules} - before))
"""


def test_it_imports_nothing_but_torch_and_the_standard_library():
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(KERNELS)}
    )
    ours = set(done.stdout.split())
    assert "dla_kernels" in ours
    assert ours - {"dla_kernels", "triton"} <= set(sys.stdlib_module_names)


def test_every_exported_name_exists_and_is_documented():
    for name in dk.__all__:
        assert getattr(dk, name).__doc__ if name not in ("BACKENDS", "POLICIES") else getattr(dk, name)
