"""What a launch leaves in the run directory: `launches/<time>/` with its script, settings, code and machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from dla_train.config import Config
from dla_train.hydra_app import config_to_yaml
from dla_train.launch.settings import LauncherConfig

PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "safetensors", "hydra-core")
VARIABLES = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_", "MASTER_", "SLURM_", "DS_", "DLA_")
"""Beginnings of the environment's names that are kept; others may hold secrets."""


def launch_folder(config: Config) -> Path:
    """A new folder's name for this moment."""
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    return Path(config.run_dir).resolve() / "launches" / moment


def write_record(folder: Path, config: Config, launcher: LauncherConfig, command: str, name: str) -> Path:
    """Write everything; `command` is the text of the file `name`, whose path is returned. Raises OSError."""
    folder.mkdir(parents=True)
    (folder / name).write_text(command, encoding="utf-8")
    (folder / name).chmod(0o755)
    (folder / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    facts = {
        "command_line": sys.argv,
        "launcher": asdict(launcher),
        "git": git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "host": platform.node(),
        "packages": {package: _version(package) for package in PACKAGES},
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(VARIABLES)},
    }
    (folder / "launch.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return folder / name


def git_state(folder: Path) -> dict[str, str] | None:
    """Commit and changed files of the source tree around `folder`; None for an installed package."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": _git(folder, "status", "--short", "--untracked-files=no")}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
