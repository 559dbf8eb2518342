"""The code of an exported folder: this project's own sources, flattened, so that there is one source of truth.

transformers copies the Python files that lie beside `modeling_dla.py` and are imported from it relatively, and no
packages. So `dla_train.models.block` becomes `dla_train_models_block.py`, imports are rewritten, and what the model
does not need is left out. The folder needs torch and transformers only. Triton kernels are not copied: where
`dla_kernels` is installed in the same version the folder uses it, with its kernels; otherwise the copied torch forms.
"""

from __future__ import annotations

import ast
from importlib.metadata import version
from pathlib import Path

from dla_train.huggingface.errors import FolderError

ENTRY = "dla_train.huggingface.modeling_dla"
"""The module whose imports, followed, are the bundle."""
_NAMES = {ENTRY: "modeling_dla", "dla_train.huggingface.configuration_dla": "configuration_dla"}
_OURS = ("dla_train", "dla_kernels")
_NO_KERNELS = (
    "raise ImportError(\"Triton kernels are in the package dla-train; pip install it, or use backend='torch'\")"
)
_CHANGED = {
    # without kernels, the torch forms are the default on CUDA too
    "dla_kernels.launch": ('DEFAULT_ON_CUDA = "triton"', 'DEFAULT_ON_CUDA = "torch"'),
    # transformers 4 makes parameters again from their attributes, which must be torch's own
    "dla_train.models.linear": ("parameter.no_weight_decay = True  # type: ignore[attr-defined]\n    ", ""),
}
"""The only lines of the copies that are not the originals', imports aside."""
_MISSING = 'MISSING: Any = "???"  # omegaconf\'s, which this folder does not need'


def bundle() -> dict[str, str]:
    """Text of every Python file of an exported folder, by file name."""
    found: dict[str, str] = {}
    waiting = [ENTRY]
    while waiting:
        module = waiting.pop()
        name = f"{flat_name(module)}.py"
        if name not in found:
            found[name], needed = _flattened(module)
            waiting += needed
    entry = f"{flat_name(ENTRY)}.py"
    found[entry] += _named(sorted(name.removesuffix(".py") for name in found if name != entry))
    return dict(sorted(found.items()))


def flat_name(module: str) -> str:
    """`dla_train_models_block` of dla_train.models.block."""
    return _NAMES.get(module, module.replace(".", "_"))


def _named(modules: list[str]) -> str:
    """Imports of every file that never run: transformers 4 copies what the entry imports, not what that imports."""
    lines = "\n".join(f"    from .{module} import __doc__" for module in modules)
    begin = "\n\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:  # so that transformers 4 copies all files"
    return f"{begin}\n{lines}\n"


def _flattened(module: str) -> tuple[str, list[str]]:
    """(text, modules of ours it imports)."""
    path = _path_of(module)
    lines = path.read_text(encoding="utf-8").splitlines()
    needed: list[str] = []
    for node in sorted(_imports(lines), key=lambda node: -node.lineno):
        replaced, modules = _rewritten(node)
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in replaced]
        needed += modules
    text = "\n".join(lines) + "\n"
    if module == "dla_kernels":
        text = _package(text)
    before, after = _CHANGED.get(module, ("", ""))
    if before and text.count(before) != 1:
        raise FolderError(f"{path} does not say {before!r} once, which a copy of it changes")
    return text.replace(before, after) if before else text, needed


def _imports(lines: list[str]) -> list[ast.ImportFrom]:
    """The imports to rewrite: of ours, and of omegaconf's one constant."""
    nodes = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.ImportFrom)]
    return [node for node in nodes if (node.module or "").split(".")[0] in (*_OURS, "omegaconf")]


def _rewritten(node: ast.ImportFrom) -> tuple[list[str], list[str]]:
    """(lines in its place, modules of ours that they import)."""
    module = node.module or ""
    if module == "omegaconf":
        return [_MISSING], []
    if module.endswith("_triton"):
        return [_NO_KERNELS], []
    lines, needed = [], []
    for alias in node.names:
        whole = f"{module}.{alias.name}"
        if _is_module(whole):
            lines.append(f"from . import {flat_name(whole)} as {alias.asname or alias.name}")
            needed.append(whole)
            continue
        renamed = f" as {alias.asname}" if alias.asname else ""
        lines.append(f"from .{flat_name(module)} import {alias.name}{renamed}")
        needed.append(module)
    return lines, needed


def _package(text: str) -> str:
    """dla_kernels' `__init__`: what is installed if it is of this version, else the copies beside it."""
    tree = ast.parse(text)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = sorted(alias.name for node in imports for alias in node.names)
    copied = "\n".join(f"    {ast.unparse(node)}" for node in imports)
    return f'''"""{ast.get_docstring(tree)}"""

from importlib.metadata import PackageNotFoundError, version

try:
    if version("dla-train") != "{version("dla-train")}":
        raise ImportError("another version of dla_kernels is installed")
    from dla_kernels import {", ".join(names)}
except (ImportError, PackageNotFoundError):
{copied}

__all__ = {names}
'''


def _is_module(name: str) -> bool:
    return _file_of(name) is not None


def _path_of(module: str) -> Path:
    path = _file_of(module)
    if path is None:
        raise FolderError(f"{module} is imported by the model and has no source file; install dla-train from source")
    return path


def _file_of(module: str) -> Path | None:
    """Source of a module of ours; an installed dla_kernels lies elsewhere than dla_train."""
    top, _, rest = module.partition(".")
    package = __import__(top)
    base = (
        Path(package.__file__ or "").parent.joinpath(*rest.split(".")) if rest else Path(package.__file__ or "").parent
    )
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None
