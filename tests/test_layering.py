"""Imports point one way, and each heavy third party has one door."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS: tuple[set[str], ...] = (  # a component imports itself and layers above it in this table, nothing else of ours
    {"dla_kernels", "config", "intervals", "durable", "text_tables"},
    {"layout_rules", "evaluation_rules"},
    {"data_config"},
    {"config_rules", "config_sentences", "group_choices", "initial_model", "start_clock", "run_process", "trackers"},
    {"hydra_app"},
    {"multirun"},
    {"parallel"},
    {"models", "data"},
    {"segments"},
    {"optim", "metrics"},
    {"telemetry"},
    {"logical_state"},
    {"engine", "checkpoint"},
    {"evaluate", "data_prep", "resilience"},
    {"huggingface"},
    {"run_log"},
    {"loop"},
    {"generate", "diagnose", "inspect_memory", "runs"},
    {"harness", "recall"},
    {"train"},
    {"quickstart", "bench", "plan_run", "inspect_data"},
    {"doctor"},
    {"launch"},
    {"sweep"},
)
LEVEL = {component: level for level, layer in enumerate(LAYERS) for component in layer}
DOORS = {  # third party: path prefixes that may import it
    "triton": ("kernels/dla_kernels/",),
    "megatron": ("dla_train/parallel/", "dla_train/data/", "dla_train/bench/data.py"),
    "deepspeed": ("dla_train/engine/",),
    "transformers": ("dla_train/data/tokenizer.py", "dla_train/huggingface/"),
    "optuna": ("dla_train/sweep/",),
    "lm_eval": ("dla_train/harness/",),
}
WITHOUT_TORCH = (
    "config",
    "layout_rules",
    "data_config",
    "evaluation_rules",
    "config_rules",
    "group_choices",
    "initial_model",
)


def component(module: str) -> str:
    """`data` of dla_train.data.loader; the top package of everything else."""
    parts = module.split(".")
    return parts[1] if parts[0] == "dla_train" and len(parts) > 1 else parts[0]


def level(name: str, path: str) -> int:
    """Layer number of a component; the package `dla_train` itself must import nothing of ours."""
    assert name == "dla_train" or name in LEVEL, f"{path}: give {name} a layer in {Path(__file__).name}"
    return LEVEL.get(name, 0)


def imported(source: str) -> set[str]:
    """Every module a file imports, at any depth; `from a import b` counts as a.b, for b may be a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(path: str, source: str) -> list[str]:
    """What the file at `path` (relative to the root) must not import."""
    module = path.removeprefix("kernels/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    own = component(module)
    wrong = []
    for name in sorted(imported(source)):
        top, other = name.split(".")[0], component(name)
        if not path.startswith(DOORS.get(top, "")):
            wrong.append(f"{path} imports {name}: only {DOORS[top]} may")
        if top in ("dla_train", "dla_kernels", "data_prep") and other != own:
            upward = level(other, path) >= level(own, path)
            if upward or (own == "data_prep" and other not in ("data", "durable")) or own == "dla_kernels":
                wrong.append(f"{path} imports {name}: its layer is not below")
        if own in WITHOUT_TORCH and top == "torch":
            wrong.append(f"{path} imports {name}: a configuration is checked without torch")
    return wrong


def test_imports_of_every_file_point_down() -> None:
    files = [
        path for package in ("kernels", "dla_train", "data_prep") for path in sorted((ROOT / package).rglob("*.py"))
    ]
    assert len(files) > 30
    assert [wrong for path in files for wrong in violations(path.relative_to(ROOT).as_posix(), path.read_text())] == []


def test_the_table_of_the_docs_is_this_one() -> None:
    docs = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = docs.partition("## Layers")[2].split("```")[1]
    assert [set(re.findall(r"\w+", layer)) for layer in table.split("<")] == list(LAYERS)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dla_train/data/loader.py", "from dla_train.train import main"),
        ("dla_train/data/loader.py", "from dla_train import models"),
        ("dla_train/models/block.py", "def f():\n    import dla_train.optim"),
        ("dla_train/engine.py", "from dla_train.checkpoint.state import x"),
        ("dla_train/checkpoint/__init__.py", "from dla_train.evaluate import y"),
        ("dla_train/config.py", "import torch"),
        ("dla_train/data_config.py", "import torch"),
        ("dla_train/config.py", "from dla_train.config_rules import validate"),
        ("dla_train/__init__.py", "from dla_train.train import main"),
        ("kernels/dla_kernels/plan.py", "from dla_train.config import Config"),
        ("data_prep/sources.py", "from dla_train.config import ConfigError"),
        ("dla_train/data/order.py", "from data_prep.sources import PrepareError"),
        ("dla_train/models/block.py", "import triton.language as tl"),
        ("dla_train/models/linear.py", "from megatron.core import parallel_state"),
        ("dla_train/train.py", "import deepspeed"),
        ("dla_train/loop.py", "import optuna"),
        ("dla_train/generate/command.py", "from transformers import AutoTokenizer"),
    ],
)
def test_a_violation_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dla_train/train.py", "from dla_train.data.loader import Batch\nimport torch"),
        ("dla_train/data/loader.py", "from dla_train.config import DataConfig\nfrom megatron.core import datasets"),
        ("data_prep/prepare.py", "from dla_train.data.errors import DataError"),
    ],
)
def test_a_legal_import_is_not_a_violation(path: str, source: str) -> None:
    assert violations(path, source) == []
