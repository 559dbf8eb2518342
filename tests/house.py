"""The state of the code in numbers: `python -m tests.house` prints them, tests/test_house.py holds what is a rule.

Measured are kernels/, dla_train/ and data_prep/, without tests. A line of code is one that is neither blank nor a
comment nor part of a docstring.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import sys
import time
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "dla_train", "data_prep")
DUPLICATE_LINES = 6
"""Equal lines in a row that count as written twice."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file of Python."""

    path: Path
    text: str

    @property
    def module(self) -> str:
        """Its name where it is imported."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        parts = parts[1:] if parts[0] == "kernels" else parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def tree(self) -> ast.Module:
        """Parsed."""
        return ast.parse(self.text)

    @cached_property
    def code(self) -> dict[int, str]:
        """Lines of code by number, without comments and the space around them."""
        kept = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                kept |= set(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(self.tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                kept -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        lines = self.text.splitlines()
        return {number: lines[number - 1].split("  #")[0].strip() for number in sorted(kept) if number <= len(lines)}

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Every function and method with the names around it."""
        yield from _functions(self.tree, "")


def _functions(node: ast.AST, inside: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        name = f"{inside}{child.name}" if isinstance(child, ast.ClassDef | Function) else inside
        if isinstance(child, Function):
            yield name, child
        yield from _functions(child, f"{name}." if isinstance(child, ast.ClassDef | Function) else inside)


def _string(node: ast.AST) -> str | None:
    """The text of a string's node, None of any other."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def sources() -> list[Source]:
    """Every file, sorted."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [Source(path, path.read_text(encoding="utf-8")) for path in files]


def function_lines(source: Source) -> dict[str, int]:
    """Lines of code of every function, its signature included, by name."""
    return {
        name: sum(node.lineno <= line <= (node.end_lineno or 0) for line in source.code)
        for name, node in source.functions()
    }


def bare_arguments(source: Source) -> tuple[int, int]:
    """(arguments without an annotation, all of them), of functions that are not kernels of Triton."""
    bare = every = 0
    for _, node in source.functions():
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        named = [argument for argument in arguments if argument and argument.arg not in ("self", "cls")]
        every += len(named)
        bare += sum(argument.annotation is None for argument in named)
    return bare, every


def undocumented(files: list[Source]) -> list[str]:
    """Public modules, classes, functions and methods without a docstring; a method may have it where it is declared."""
    names = {name.split(".")[-1] for source in files for name, node in _definitions(source) if ast.get_docstring(node)}
    return [
        f"{source.module}{name}"
        for source in files
        for name, node in [("", source.tree), *_definitions(source)]
        if not ast.get_docstring(node) and not (name.count(".") > 1 and name.split(".")[-1] in names)
    ]


def _definitions(source: Source) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes and functions, and public methods of such classes, as `.name` and `.Class.name`."""
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield f".{node.name}", node
            for child in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(child, Function) and not child.name.startswith("_"):
                    yield f".{node.name}.{child.name}", child


def duplicates(files: list[Source]) -> list[tuple[str, str]]:
    """Pairs of places whose next DUPLICATE_LINES lines of code are equal; imports and bare brackets do not count."""
    places = defaultdict(list)
    for source in files:
        lines = [(n, text) for n, text in source.code.items() if not re.fullmatch(r"(from|import) .*|[\])},]+:?", text)]
        for begin in range(len(lines) - DUPLICATE_LINES + 1):
            run = lines[begin : begin + DUPLICATE_LINES]
            places["\n".join(text for _, text in run)].append(f"{source.path.relative_to(ROOT)}:{run[0][0]}")
    return [(found[0], other) for found in places.values() for other in found[1:]]


def import_cycles(files: list[Source]) -> list[list[str]]:
    """Modules that import each other while they are imported, as groups; imports inside functions do not count."""
    names = {source.module for source in files}
    edges = {source.module: _imported(source, names) for source in files}
    reached = {name: _reached(name, edges) for name in names}
    groups = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in names if a in reached[a]}
    return [list(group) for group in sorted(groups)]


def _imported(source: Source, names: set[str]) -> set[str]:
    found = set()
    for node in ast.iter_child_nodes(source.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in names else str(node.module) for member in members}
    return (found & names) - {source.module}


def _reached(name: str, edges: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    ahead = [name]
    while ahead:
        ahead += (new := edges[ahead.pop()] - found)
        found |= new
    return found


def unread_options(files: list[Source]) -> list[str]:
    """Fields of the configuration's dataclasses that nothing reads outside config.py and the rules between settings.

    A field is read as an attribute, or by a name that a string or an f-string may spell.
    """
    names, patterns = set(), set()
    for source in files:
        if source.module not in ("dla_train.config", "dla_train.config_rules"):
            nodes = list(ast.walk(source.tree))
            names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            names |= {_string(node) for node in nodes}
            patterns |= {_pattern(node) for node in nodes if isinstance(node, ast.JoinedStr)}
    config = next(source for source in files if source.module == "dla_train.config")
    return [
        f"{node.name}.{item.target.id}"
        for node in config.tree.body
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id not in names
        if not any(re.fullmatch(pattern, item.target.id) for pattern in patterns)
    ]


def _pattern(node: ast.JoinedStr) -> str:
    """What an f-string without spaces may spell; nothing for one that is only its values."""
    spelt = "".join(r"\w+" if (text := _string(part)) is None else re.escape(text) for part in node.values)
    return spelt if re.search("[a-z]{3}", spelt) else ""


def cold_starts() -> dict[str, float]:
    """Seconds of every command to its help text, the best of three."""
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    return {name: min(_seconds(entry) for _ in range(3)) for name, entry in commands.items()}


def _seconds(entry: str) -> float:
    module, _, function = entry.partition(":")
    program = f"import sys; from {module} import {function}; sys.argv = ['x', '--help']; sys.exit({function}())"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    files = sources()
    sizes = {str(source.path.relative_to(ROOT)): len(source.text.splitlines()) for source in files}
    functions = {
        f"{s.path.relative_to(ROOT)}: {name}": lines for s in files for name, lines in function_lines(s).items()
    }
    bare, every = (sum(numbers) for numbers in zip(*map(bare_arguments, files), strict=True))
    longest, largest = max(functions, key=functions.__getitem__), max(sizes, key=sizes.__getitem__)
    rows = {
        "files": len(files),
        "lines": sum(sizes.values()),
        "lines of code": sum(len(source.code) for source in files),
        "median file, lines": statistics.median(sizes.values()),
        "longest file": f"{sizes[largest]} ({largest})",
        "median function, lines of code": statistics.median(functions.values()),
        "longest function": f"{functions[longest]} ({longest})",
        "functions of more than 40 lines": sum(lines > 40 for lines in functions.values()),
        "annotated arguments": f"{100 * (1 - bare / every):.1f}%",
        f"runs of {DUPLICATE_LINES} lines that stand twice": len(duplicates(files)),
        "import cycles": len(import_cycles(files)),
        "options that nobody reads": len(unread_options(files)),
        "public names without a docstring": len(undocumented(files)),
    }
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    for name, seconds in cold_starts().items() if "--fast" not in sys.argv else ():
        print(f"| `{name} --help`, seconds | {seconds:.1f} |")


if __name__ == "__main__":
    main()
