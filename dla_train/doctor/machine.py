"""This machine: versions of what the run imports, within the ranges of the package, and its devices."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from importlib import metadata

import torch
from packaging.requirements import Requirement

from dla_train.config import Config
from dla_train.doctor.findings import FAILED, OK, WARNING, Finding
from dla_train.parallel.cores import available_cores

PACKAGE = "dla-train"


def check_versions(config: Config) -> list[Finding]:
    """Whether every package that this run imports is there, in a version that the project takes."""
    try:
        ranges = {r.name: r for r in map(Requirement, metadata.requires(PACKAGE) or [])}
    except metadata.PackageNotFoundError:
        ranges = {}
    found, wrong = [f"python {platform.python_version()}"], []
    for name, why in _needed(config).items():
        version = _version(name)
        if version is None:
            wrong.append(f"{name} is not installed, which {why} needs; run `pip install {ranges.get(name, name)}`")
            continue
        found.append(f"{name} {version}")
        if name in ranges and not ranges[name].specifier.contains(version, prereleases=True):
            specifier = ranges[name].specifier
            wrong.append(f"{name} {version} is not {specifier}; run `pip install '{name}{specifier}'`")
    what = ", ".join(found)
    if wrong:
        return [Finding("versions", FAILED, problem) for problem in wrong]
    if not ranges:
        mend = f"{PACKAGE} is not installed, so no range is known; run `pip install -e .`"
        return [Finding("versions", WARNING, f"{what}; {mend}")]
    return [Finding("versions", OK, what)]


def check_devices(config: Config, ranks_here: int) -> Finding:
    """Whether the devices of this machine suffice for its ranks and are free."""
    if not torch.cuda.is_available():
        if config.train.device == "cuda":
            rule = "PyTorch sees no CUDA device here"
            built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "look at nvidia-smi"
            return Finding("devices", FAILED, f"train.device=cuda, but {rule}: {built}; or set train.device=cpu")
        return Finding("devices", OK, f"{ranks_here} rank(s) here on the CPU, {available_cores()} cores")
    if config.train.device == "cpu":
        return Finding(
            "devices", OK, f"{ranks_here} rank(s) here on the CPU by train.device=cpu, {available_cores()} cores"
        )
    return _cuda(config, ranks_here)


def _cuda(config: Config, ranks_here: int) -> Finding:
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    what = f"{count} x {name}, CUDA {torch.version.cuda}, NCCL {nccl}, driver {_driver()}"
    if ranks_here > count:
        rule = f"fewer than the {ranks_here} ranks here, which would share them"
        mend = f"start {count} or fewer ranks on this machine (launcher.ranks_per_node)"
        return Finding("devices", FAILED, f"{what}: {rule}; {mend}")
    if config.train.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("devices", WARNING, f"{what}: no bfloat16 in hardware; set train.dtype=float32")
    free, total = torch.cuda.mem_get_info()
    if free < 0.9 * total:
        taken = f"{(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB are taken"
        return Finding("devices", WARNING, f"{what}: {taken}; look at nvidia-smi for another process")
    return Finding("devices", OK, what)


def _needed(config: Config) -> dict[str, str]:
    """Packages that the run imports, and what for."""
    needed = dict.fromkeys(("torch", "numpy", "hydra-core", "safetensors"), "every run")
    if config.train.device != "cpu" and torch.cuda.is_available():
        needed["triton"] = "memory.backend on CUDA"
    if config.engine.name == "deepspeed":
        needed["deepspeed"] = "engine.name=deepspeed"
    if config.parallel.tensor * config.parallel.context > 1:
        needed["megatron-core"] = "parallel.tensor or parallel.context"
    if config.data.tokenizer.endswith(".model"):
        needed["sentencepiece"] = "data.tokenizer"
    else:
        needed["transformers"] = "data.tokenizer"
    if config.logging.wandb:
        needed["wandb"] = "logging.wandb"
    return needed


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    """Version of NVIDIA's driver, as nvidia-smi tells it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    match = re.search(r"[\d.]+", told)
    return match[0] if match else "unknown"
