"""The page of an inspection: one HTML file with its data, style and program inside, which loads nothing.

Arrays travel as base64 of little-endian numbers; read weights as 16-bit shares of the head's largest one, live slots
only. `page.html` draws; the slots of every moment follow from boundaries and deaths there as they do in `history.py`.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dla_train.config import ConfigError
from dla_train.inspect_memory.history import HeadHistory, Inspection

STEPS = 65535
"""Of a read weight between 0 and the head's largest."""
MOST_BYTES = 64 * 2**20
"""Largest page: beyond it browsers are slow."""


def write_page(found: Inspection, output: Path, *, title: str, facts: Sequence[str], chosen: HeadHistory) -> None:
    """Write the page, which begins with the head `chosen`. Raises ConfigError where it would be larger than MOST_BYTES.

    facts: short phrases about run and text, for its second line.
    """
    data = {
        "pieces": found.pieces,
        "facts": list(facts),
        "chosen": [chosen.layer, chosen.head],
        "heads": [_plain(head) for head in found.heads],
    }
    # a script element ends at the first "</", whatever string it stands in
    body = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = files("dla_train.inspect_memory").joinpath("page.html").read_text(encoding="utf-8")
    page = template.replace("@TITLE@", html.escape(title)).replace("@DATA@", body)
    if len(page) > MOST_BYTES:
        raise ConfigError(
            f"the page of {len(found.heads)} heads x {len(found.pieces)} tokens would have {len(page) / 2**20:.0f} MiB "
            f"and may have {MOST_BYTES // 2**20}; choose a layer=, a head= or a shorter text"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")


def _plain(head: HeadHistory) -> dict[str, Any]:
    live = ~np.isnan(head.weights)
    largest = float(head.weights[live].max())
    shares = np.rint(head.weights[live] / max(largest, 1e-30) * STEPS)
    death = np.where(head.boundary, head.death, -1)
    return {
        "layer": head.layer,
        "head": head.head,
        "capacity": head.capacity,
        "tau": head.tau,
        "score": _packed(head.score, "<f4"),
        "death": _packed(death, "<i4"),
        "gate": None if head.gate is None else _packed(head.gate, "<f4"),
        "weights": _packed(shares, "<u2"),
        "largest": largest,
    }


def _packed(values: NDArray[Any], kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode("ascii")
