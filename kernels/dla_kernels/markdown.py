"""Tables in Markdown, of which the pages of results are made."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = ()) -> str:
    """The lines of a table, without the last one's end. Columns whose heads are in `right` are set flush right.

    Empty cells stay empty, and a `|` in a cell is escaped. Raises ValueError for a row that has not the head's columns.
    """
    lines = [_line(head), "|" + "|".join("---:" if name in right else "---" for name in head) + "|"]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"the row {list(row)} has {len(row)} cells, and the head {list(head)} has {len(head)}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
