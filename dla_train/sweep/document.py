"""A report as blocks, written as Markdown beside its pictures or as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from dla_kernels.markdown import markdown_table
from dla_train.durable import write_atomically

PICTURES = "report"
"""Folder of the Markdown's pictures."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 90rem; margin: 2rem auto; padding: 0 1rem }
p, pre { max-width: 72rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .45rem; border-bottom: 1px solid #e5e5e5; text-align: right; white-space: nowrap }
th { background: #f5f5f5; white-space: normal; vertical-align: bottom }
td.text, th.text { text-align: left; white-space: normal; min-width: 10rem }
tr.first td { font-weight: 600 } pre { background: #f5f5f5; padding: .8rem; white-space: pre-wrap; font-size: 13px }
img { max-width: 100% } figcaption { color: #555; font-size: 13px } figure { margin: 1rem 0 }
"""


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the document's."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows under a head; columns named in `left` hold words, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str]
    best_first: bool = False
    """Whether the first row stands out."""


@dataclass(frozen=True)
class Picture:
    """A figure with a caption; `name` is its file."""

    name: str
    figure: Figure
    caption: str


Block = Heading | Paragraph | Code | Table | Picture


def write_document(folder: Path, blocks: Sequence[Block], *, with_html: bool) -> Path:
    """Write report.md with its pictures into `folder`, and report.html if asked; returns the page made last."""
    pictures = {block.name: _png(block.figure) for block in blocks if isinstance(block, Picture)}
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        (folder / PICTURES / f"{name}.png").write_bytes(content)
    write_atomically(folder / "report.md", "\n\n".join(_markdown(block) for block in blocks) + "\n")
    if not with_html:
        return folder / "report.md"
    body = "\n".join(_html(block, pictures) for block in blocks)
    title = next(block.text for block in blocks if isinstance(block, Heading))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Code(text):
            return f"```\n{text}\n```"
        case Picture(name, _, caption):
            return f"![{caption}]({PICTURES}/{name}.png)\n\n{caption}"
        case Table(head, rows, left):
            return markdown_table(head, rows, right=[name for name in head if name not in left])


def _html(block: Block, pictures: dict[str, bytes]) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Picture(name, _, caption):
            data, words = base64.b64encode(pictures[name]).decode(), html.escape(caption)
            image = f'<img alt="{words}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{words}</figcaption></figure>"
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    kinds = [' class="text"' if name in table.left else "" for name in table.head]

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{kind}>{html.escape(c)}</{tag}>" for c, kind in zip(cells, kinds, strict=True))

    kept = [" class=first" if table.best_first and not number else "" for number in range(len(table.rows))]
    rows = "\n".join(f"<tr{kind}>{line(row, 'td')}</tr>" for kind, row in zip(kept, table.rows, strict=True))
    return f'<div class="wide"><table><tr>{line(table.head, "th")}</tr>\n{rows}</table></div>'
