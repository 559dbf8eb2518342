"""How much of each package the last `make coverage` ran: docs/results/coverage.json and .md.

`python -m tests.coverage_page --output FOLDER` reads `.coverage` and writes both.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import coverage
import torch

from dla_kernels.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
LOW = 0.8
"""Files of a smaller share are listed."""


def measured(data: str) -> dict[str, tuple[int, int]]:
    """(statements, statements that ran) of every file, by its path."""
    found = coverage.Coverage(data_file=data, config_file=str(ROOT / "pyproject.toml"))
    found.load()
    counts = {}
    for path in found.get_data().measured_files():
        _, statements, _, missing, _ = found.analysis2(path)
        name = Path(path) if not Path(path).is_absolute() else Path(path).relative_to(ROOT)
        counts[name.as_posix()] = (len(statements), len(statements) - len(missing))
    return counts


def package_of(path: str) -> str:
    """The folder of a module, but for those beside packages the module itself."""
    folder = Path(path).parent.as_posix()
    return path if folder == "dla_train" else folder


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    files: dict[str, list[int]] = results["files"]
    packages: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path, (statements, ran) in files.items():
        packages[package_of(path)][0] += statements
        packages[package_of(path)][1] += ran
    total = [sum(numbers) for numbers in zip(*packages.values(), strict=True)]
    low = {path: numbers for path, numbers in files.items() if numbers[1] < LOW * numbers[0]}
    return "\n".join(
        [
            "# Coverage",
            "",
            "Made by `make coverage`; every file in coverage.json. Statements that the test suite ran, those in the "
            "processes it starts included, without a GPU, SLURM or several hosts. Python "
            f"{results['versions']['python']}, torch {results['versions']['torch']}.",
            "",
            _table("package", {**dict(sorted(packages.items())), "all": total}),
            "",
            f"Files below {LOW:.0%}:",
            "",
            _table("file", dict(sorted(low.items(), key=lambda item: item[1][1] / item[1][0]))),
            "",
        ]
    )


def _table(title: str, rows: dict[str, list[int]]) -> str:
    lines = [[name, str(count), f"{ran / max(count, 1):.0%}"] for name, (count, ran) in rows.items()]
    return markdown_table([title, "statements", "ran"], lines, right=("statements", "ran"))


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=".coverage", help="what coverage wrote (default %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results", help="folder (default %(default)s)")
    arguments = parser.parse_args()
    if not Path(arguments.data).exists():
        parser.error(f"{arguments.data} is not there; run make coverage")
    files = {path: list(numbers) for path, numbers in sorted(measured(arguments.data).items()) if numbers[0]}
    results = {"versions": {"python": platform.python_version(), "torch": torch.__version__}, "files": files}
    (arguments.output / "coverage.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "coverage.md").write_text(page(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
