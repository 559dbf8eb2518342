"""Compile every Triton kernel for a GPU that need not be there, and say what each takes of it.

`record` runs a whole layer on meta tensors at production shapes and collects its launches; `build` turns one into
machine code for compute capability 80 or 90 and reads its registers, spills, shared memory and matrix instructions.
Nothing runs, so this works on any machine with Triton: `python -m dla_kernels.build_report --output docs/results`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dla_kernels.attention import dla_attention, slot_affinity
from dla_kernels.conv1d import short_conv
from dla_kernels.launch import Launch, recording
from dla_kernels.markdown import markdown_table
from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.gates import boundary_gate, boundary_score, content_read_weights
from dla_kernels.norm import gated_rms_norm
from dla_kernels.planner import plan_memory
from dla_kernels.step import dla_step

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
class Layer:
    """One production layer: heads, sizes and slots."""

    name: str
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    gated: bool
    capacity: int = 30
    closed_slots: str = "transition"
    drift: str = "token"
    capacity_rule: str = "mass"
    chunk: int | None = None
    tokens: int = 16384


LAYERS = (
    Layer("mamba2_780m", 48, 1, 128, 64, gated=False),
    Layer("mamba2_780m frozen", 48, 1, 128, 64, gated=False, closed_slots="frozen"),
    Layer("gated_deltanet_1300m", 6, 6, 192, 384, gated=True),
    Layer("gated_deltanet_1300m frozen", 6, 6, 192, 384, gated=True, closed_slots="frozen", drift="update"),
    Layer("gated_deltanet_1300m density", 6, 6, 192, 384, gated=True, capacity_rule="density"),
    Layer("gated_deltanet 128, 8 slots, C 64", 16, 16, 128, 128, gated=True, capacity=8, chunk=64),
    Layer("largest: 256 x 512, 64 slots, C 64", 4, 2, 256, 512, gated=True, capacity=64, chunk=64),
    Layer("largest, density", 4, 2, 256, 512, gated=True, capacity=64, chunk=64, capacity_rule="density"),
)


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
    options = {name: values.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in values}
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


def record(layer: Layer, architecture: int) -> list[Launch]:
    """Every launch of planning, reading, mixing and stepping one layer with its gradients, in bfloat16."""
    shape = (1, layer.tokens, layer.heads)

    def tensor(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    def gate(*size: int) -> Tensor:
        return tensor(*size, dtype=torch.float32)

    q, k = (tensor(1, layer.tokens, layer.key_heads, layer.key_dim) for _ in range(2))
    v, log_decay = tensor(*shape, layer.value_dim), gate(*shape)
    beta = gate(*shape) if layer.gated else None
    tau, gain, sharpness = gate(layer.heads), gate(layer.heads), gate(layer.heads)
    options: dict[str, Any] = {"backend": "triton", "chunk_size": layer.chunk}
    with recording(architecture) as launches:
        channels = layer.heads * layer.value_dim
        mixed = short_conv(tensor(1, layer.tokens, channels), tensor(channels, 4), backend="triton")
        plan = plan_memory(
            k,
            v,
            log_decay,
            beta,
            tau=tau,
            capacity=layer.capacity,
            drift=layer.drift,
            capacity_rule=layer.capacity_rule,
            score_gradients=True,
            **options,
        )
        gates = boundary_gate(boundary_score(k, v, plan), plan, tau=tau, temperature=0.1)
        affinity = slot_affinity(q, k, plan, **options)
        weights = content_read_weights(
            gate(*shape, layer.capacity), affinity, gain=gain, sharpness=sharpness, backend="triton"
        )
        read = dla_attention(
            q, k, v, log_decay, beta, read_weights=weights, plan=plan, gates=gates, closed_slots=layer.closed_slots,
            routing_keys=k, return_cache=True, **options,
        )  # fmt: skip
        assert isinstance(read, tuple)
        normed = gated_rms_norm(read[0], tensor(*shape, layer.value_dim), gate(layer.value_dim), backend="triton")
        (normed.float().sum() + mixed.float().sum() + read[1].states.sum()).backward()
        _record_step(layer, gain, sharpness, tau)
    return launches


@torch.no_grad()
def _record_step(layer: Layer, gain: Tensor, sharpness: Tensor, tau: Tensor) -> None:
    batch = 8

    def tensor(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(batch, *size, dtype=dtype, device="meta")

    q, k = (tensor(layer.key_heads, layer.key_dim) for _ in range(2))
    log_decay = tensor(layer.heads, dtype=torch.float32)
    cache = MergeCache.empty(
        batch, layer.heads, layer.capacity, layer.key_dim, layer.value_dim, routing_dim=layer.key_dim, device="meta"
    )
    dla_step(
        q, k, tensor(layer.heads, layer.value_dim), log_decay, log_decay if layer.gated else None,
        read_weights=tensor(layer.heads, layer.capacity, dtype=torch.float32), tau=tau, cache=cache,
        drift=layer.drift, capacity_rule=layer.capacity_rule, closed_slots=layer.closed_slots, rho=q, kappa=k,
        gain=gain, sharpness=sharpness, backend="triton",
    )  # fmt: skip


def report(architecture: int, layers: tuple[Layer, ...] = LAYERS) -> Iterator[tuple[str, Resources]]:
    """(layer name, resources) of every different kernel of `layers`, compiled for `architecture`."""
    seen = set()
    for layer in layers:
        for launch in record(layer, architecture):
            if identity(launch) not in seen:
                seen.add(identity(launch))
                yield layer.name, build(launch, architecture)


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


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a kernel and layer."""
    head = ["kernel", "layer", "sm", "registers", "stack", "shared KiB", "warps", "matrix"]
    ordered = sorted(rows, key=lambda r: (r["kernel"], r["layer"], r["architecture"]))
    return markdown_table(head, map(_row, ordered)) + "\n"


def _row(used: dict[str, Any]) -> list[str]:
    return [
        used["kernel"],
        used["layer"],
        str(used["architecture"]),
        str(used["registers"]),
        str(used["stack_bytes"]),
        f"{used['shared_bytes'] / 1024:.0f}",
        str(used["num_warps"]),
        used["matrix_instructions"] or "-",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Compile everything; write kernel_resources.json and .md, or print one architecture's JSON."""
    parser = argparse.ArgumentParser(prog="python -m dla_kernels.build_report", description=__doc__)
    parser.add_argument("--architecture", type=int, choices=(80, 90), help="one of them alone (default: both)")
    parser.add_argument("--output", type=Path, help="folder for kernel_resources.json and .md (default: print JSON)")
    options = parser.parse_args(arguments)
    architectures = (80, 90) if options.architecture is None else (options.architecture,)
    rows = []
    for architecture in architectures:
        for name, used in report(architecture):
            rows.append({"layer": name} | used.as_dict())
            print(f"sm{architecture} {name}: {used.kernel}, {used.registers} registers", file=sys.stderr)
    if options.output is None:
        print(json.dumps(rows))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "kernel_resources.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (options.output / "kernel_resources.md").write_text(table(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
