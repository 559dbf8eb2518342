"""Small files that a reader finds whole, whatever happens while they are written: the one place that does this."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a file so that a reader sees the old contents or the new ones, also after a crash; text as UTF-8."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make the names in `folder` last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
