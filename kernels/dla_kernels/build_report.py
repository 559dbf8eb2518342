"""Compile recorded launches for a GPU that need not be there, and say what each kernel takes of it.

`build` turns one `launch.Launch` into machine code for compute capability 80 or 90 and reads its registers, spills,
shared memory and matrix instructions. Nothing runs, so this works on any machine with Triton.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dla_kernels.launch import Launch

SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory one block may use."""
_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Resources:
    """What one kernel, compiled for one architecture, uses."""

    kernel: str
    architecture: int
    constants: dict[str, Any]
    registers: int
    """Per thread."""
    stack_bytes: int
    """Per thread; above 0 are spills."""
    local_bytes: int
    shared_bytes: int
    """Per block."""
    num_warps: int
    matrix_instructions: str
    """`wgmma`, `mma` or empty."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def build(launch: Launch, architecture: int) -> Resources:
    """Compile one recorded launch. Raises what Triton raises where it does not build."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(inspect.signature(launch.kernel.fn).parameters)
    values = dict(zip(names, launch.args, strict=False)) | launch.constants
    options = {name: values.pop(name) for name in ("num_warps", "num_stages") if name in values}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value is None or name in launch.constants:
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Resources(
        kernel=launch.kernel.fn.__name__.strip("_").removesuffix("_kernel"),
        architecture=architecture,
        constants={k: v for k, v in constants.items() if v is not None},
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        matrix_instructions="wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else "",
    )


def identity(launch: Launch) -> tuple[Any, ...]:
    """Launches of equal identity are the same machine code."""
    types = tuple(str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in launch.args)
    return launch.kernel.fn.__name__, types, tuple(sorted((k, repr(v)) for k, v in launch.constants.items()))


def _usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout)}
