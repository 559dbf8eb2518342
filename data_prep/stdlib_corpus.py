"""A corpus that every machine with Python already has: its standard library, as JSONL.

Three kinds of document: the language reference's topics (pydoc), the docstrings of modules written in C (one document
per module: their text is in no source file), and every `.py` source, tests included. Docstrings of Python modules
stay in their sources, once. Order is fixed by name; a document most of whose lines stood in earlier ones is left out.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import inspect
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from dla_train.data.indexed import refuse_existing

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
_TOPICS_SOURCE = Path("pydoc_data", "topics.py")  # its text is written as topics
_MACHINE_FILES = "_sysconfigdata"  # build settings of this machine, no text
_SHORTEST_CHARACTERS = 80
_TELLING_LINE_CHARACTERS = 20  # shorter lines ("return None") say nothing about copies
_COPIED_SHARE = 0.8
_BOUND_ARGUMENT = re.compile(r"\$\w+(, /)?(, )?")  # C signatures begin with $self or $module
_NOT_IMPORTED = ("_test", "_xx", "xx", "_ctypes_test", "_tkinter", "readline")  # made for tests, or touch the screen


@dataclass
class CorpusReport:
    """What `write_stdlib_corpus` wrote and left out."""

    path: Path
    documents: dict[str, int] = field(default_factory=dict)
    """Documents by kind: topic, docstrings, source."""
    text_bytes: int = 0
    not_utf8: int = 0
    """Source files left out because they are not UTF-8 (tests of encodings)."""
    too_short: int = 0
    near_copies: int = 0


def write_stdlib_corpus(output: str | Path, *, overwrite: bool = False, progress: bool = True) -> CorpusReport:
    """Write the corpus of the running Python to OUTPUT (`.jsonl`: kind, name, text), atomically.

    The same for the same Python. Raises TokenFileError if OUTPUT exists and `overwrite` is false.
    """
    output = Path(output)
    refuse_existing([output], overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    report = CorpusReport(output)
    partial = output.with_name(output.name + ".partial")
    seen: set[bytes] = set()
    try:
        with (
            partial.open("w", encoding="utf-8") as stream,
            tqdm(unit="doc", desc="standard library", disable=not progress, total=len(_source_files())) as bar,
        ):
            for kind, name, text in _documents(report):
                if kind == "source":
                    bar.update()
                if not _is_new(text, seen, report):
                    continue
                stream.write(json.dumps({"kind": kind, "name": name, "text": text}, ensure_ascii=False) + "\n")
                report.documents[kind] = report.documents.get(kind, 0) + 1
                report.text_bytes += len(text.encode())
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return report


def _documents(report: CorpusReport) -> Iterator[tuple[str, str, str]]:
    """(kind, name, text) of every candidate, in order."""
    yield from _topics()
    for name in _compiled_modules():
        module = _import_compiled(name)
        if module is not None:
            yield "docstrings", name, _docstrings(module)
    for name, path in _source_files():
        try:
            yield "source", name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            report.not_utf8 += 1


def _topics() -> Iterator[tuple[str, str, str]]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield "topic", name, topics[name].strip() + "\n"


def _compiled_modules() -> list[str]:
    """Names of the standard library's built-in and extension modules that are safe to import, in order."""
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    names = set(sys.builtin_module_names)
    folder = Path(sysconfig.get_path("stdlib"), "lib-dynload")
    if folder.is_dir():
        names |= {path.name.split(".")[0] for path in folder.iterdir() if path.name.endswith(suffixes)}
    return sorted(name for name in names if not name.startswith(_NOT_IMPORTED))


def _import_compiled(name: str) -> ModuleType | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # some of them are deprecated; they are only read here
            return importlib.import_module(name)
    except ImportError:  # an extension whose system library is missing
        return None


def _docstrings(module: ModuleType) -> str:
    """The module's docstring and those of its public functions, classes and their methods, each under its name."""
    parts = [inspect.getdoc(module) or ""]
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(member) or inspect.isroutine(member)):
            continue
        parts.append(_entry(f"{module.__name__}.{name}", member))
        if inspect.isclass(member):
            methods = sorted((key, value) for key, value in vars(member).items() if not key.startswith("_"))
            parts += [_entry(f"{module.__name__}.{name}.{key}", value) for key, value in methods]
    return "\n\n".join(part for part in parts if part) + "\n"


def _entry(name: str, member: object) -> str:
    docstring = getattr(member, "__doc__", None)
    if not isinstance(docstring, str) or not docstring.strip():
        return ""
    signature = getattr(member, "__text_signature__", None)
    heading = name + (_BOUND_ARGUMENT.sub("", signature) if isinstance(signature, str) else "")
    return (
        heading + "\n" + "\n".join("    " + line if line else "" for line in inspect.cleandoc(docstring).splitlines())
    )


def _source_files() -> list[tuple[str, Path]]:
    """(name, path) of the library's .py files; names use `/` and fix the order."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[tuple[str, Path]] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        relative = Path(folder).relative_to(root)
        for name in names:
            path = relative / name
            if path.suffix == ".py" and path != _TOPICS_SOURCE and not name.startswith(_MACHINE_FILES):
                files.append((path.as_posix(), root / path))
    return sorted(files)


def _is_new(text: str, seen: set[bytes], report: CorpusReport) -> bool:
    """Whether to keep a document; remembers the lines of those it keeps."""
    if len(text.strip()) < _SHORTEST_CHARACTERS:
        report.too_short += 1
        return False
    telling = [line.strip() for line in text.splitlines() if len(line.strip()) >= _TELLING_LINE_CHARACTERS]
    lines = {hashlib.blake2b(line.encode(), digest_size=8).digest() for line in telling}
    if lines and len(lines & seen) >= _COPIED_SHARE * len(lines):
        report.near_copies += 1
        return False
    seen |= lines
    return True
