"""results.md: the suite's tables with this checkpoint beside the published numbers.

A table of needle tasks is written once for every length. Means are shown where every column has a number.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dla_kernels.markdown import markdown_table
from dla_train.harness.catalogue import task_entry


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    model: str
    values: dict[str, str]
    """By unit, as they are printed."""
    mean: str
    source: str


@functools.cache
def published() -> dict[str, Any]:
    """published.yaml: sources by key, and tables of rows."""
    text = Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    loaded = yaml.safe_load(text)
    assert isinstance(loaded, dict)
    return loaded


def table(tables: dict[str, list[str]], results: dict[str, dict[str, Any]], title: str) -> str:
    """The Markdown page of some results by unit."""
    parts = [f"# {title}\n"]
    used: list[str] = []
    for name, tasks in tables.items():
        for length in _lengths(tasks, results):
            columns = [task if length is None else f"{task}_{length}" for task in tasks]
            if not any(column in results for column in columns):
                continue
            rows = [_own(columns, results, title), *_published(name, length, columns)]
            used += [row.source for row in rows]
            heading = name if length is None else f"{name}, {length} tokens"
            parts.append(f"## {heading}\n\n{_table(columns, tasks, rows)}\n")
    notes = {key: note for key, note in published()["sources"].items() if key in used}
    if notes:
        parts.append(
            "Sources of the published numbers:\n\n" + "".join(f"- {key}: {note}\n" for key, note in notes.items())
        )
    return "\n".join(parts)


def _lengths(tasks: Sequence[str], results: dict[str, dict[str, Any]]) -> list[int | None]:
    found = {result["length"] for result in results.values() if result["task"] in tasks}
    return sorted(found, key=lambda length: length or 0)


def _own(columns: Sequence[str], results: dict[str, dict[str, Any]], title: str) -> Row:
    values, numbers = {}, []
    for column in columns:
        if column not in results:
            continue
        entry = task_entry(results[column]["task"])
        found = results[column]["metrics"][entry.metric]
        scale = 100 if entry.percent else 1
        numbers.append(scale * found["value"])
        spread = "" if found["stderr"] is None else f" ± {scale * found['stderr']:.1f}"
        values[column] = f"{numbers[-1]:.1f}{spread}"
    mean = f"{sum(numbers) / len(numbers):.1f}" if len(numbers) == len(columns) > 1 else ""
    return Row(f"**{title}**", values, mean, "")


def _published(name: str, length: int | None, columns: Sequence[str]) -> list[Row]:
    rows = []
    for row in published()["tables"].get(name, []):
        values = {column: str(row["values"][column]) for column in columns if column in row["values"]}
        mean = row.get("mean", "") if length is None else row.get("means", {}).get(length, "")
        if values or mean != "":
            rows.append(Row(row["model"], values, str(mean), row["source"]))
    return rows


def _table(columns: Sequence[str], tasks: Sequence[str], rows: Sequence[Row]) -> str:
    entries = [task_entry(task) for task in tasks]
    return markdown_table(
        ["", *(f"{entry.label} {entry.metric}" for entry in entries), "mean", "source"],
        [[row.model, *(row.values.get(column, "") for column in columns), row.mean, row.source] for row in rows],
    )
