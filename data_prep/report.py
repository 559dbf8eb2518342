"""The report of a preparation: what was read, left out and written, by whom, how fast. `OUTPUT.report.json`."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from data_prep.records import FAULTS
from data_prep.state import State
from dla_train.data.shard_list import Shard
from dla_train.data.tokenizer import Tokenizer
from dla_train.durable import write_atomically

FORMAT_VERSION = 1
_LIBRARIES = ("numpy", "sentencepiece", "tokenizers", "transformers", "datasets", "pyarrow", "datasketch")


@dataclass(frozen=True)
class SplitReport:
    """One split."""

    prefix: str
    """Of its token file, or of all its shards."""
    documents: int
    tokens: int
    text_bytes: int
    shards: int
    """Token files."""


@dataclass(frozen=True)
class TokensReport:
    """What `write_tokens` read and wrote."""

    splits: dict[str, SplitReport]
    """`all`, or `train` and `validation`."""
    counts: dict[str, int]
    """Records by what became of them: `kept`, and the kinds of records.FILTERED and FAULTS that occurred."""
    faults: list[str]
    """The first of the records that could not be used: file, place, reason."""
    seconds: float
    """Of all starts, without what was lost when one was killed."""

    @property
    def errors(self) -> int:
        """Records that could not be used."""
        return sum(count for kind, count in self.counts.items() if kind in FAULTS)


def write_report(output: str, tails: dict[str, str], tokenizer: Tokenizer, state: State, workers: int) -> TokensReport:
    """Write OUTPUT.report.json atomically; what it says."""
    splits = {}
    for split, tail in tails.items():
        shards = state.splits[split]
        splits[split] = SplitReport(
            prefix=f"{output}{tail}",
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            shards=len(shards),
        )
    report = TokensReport(splits, dict(sorted(state.counts.items())), list(state.faults), state.seconds)
    contents = _contents(report, output, tokenizer, state, workers)
    write_atomically(Path(f"{output}.report.json"), json.dumps(contents, indent=2) + "\n")
    return report


def _contents(report: TokensReport, output: str, tokenizer: Tokenizer, state: State, workers: int) -> dict[str, Any]:
    seconds = max(report.seconds, 1e-9)
    tokens = sum(split.tokens for split in report.splits.values())
    text_bytes = sum(split.text_bytes for split in report.splits.values())
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        "settings": state.settings,
        "inputs": state.inputs,
        "counts": report.counts,
        "faults": report.faults,
        "splits": {name: _split(split, state.splits[name], output) for name, split in report.splits.items()},
        "seconds": report.seconds,
        "workers": workers,
        "tokens_per_second": tokens / seconds,
        "text_bytes_per_second": text_bytes / seconds,
        "versions": _versions(),
    }


def _split(split: SplitReport, shards: Sequence[Shard], output: str) -> dict[str, Any]:
    """A split and its shards, with the hashes that lie beside them."""
    return {
        "prefix": Path(split.prefix).name,
        "documents": split.documents,
        "tokens": split.tokens,
        "text_bytes": split.text_bytes,
        "bytes_per_token": split.text_bytes / max(split.tokens, 1),
        "shards": [
            {
                "name": shard.name,
                "documents": shard.documents,
                "tokens": shard.tokens,
                "text_bytes": shard.text_bytes,
                "sha256": _hashes(Path(output).with_name(f"{shard.name}.sha256")),
            }
            for shard in shards
        ],
    }


def _hashes(listing: Path) -> dict[str, str]:
    """sha256 by file name."""
    lines = [line.split("  ", 1) for line in listing.read_text(encoding="utf-8").splitlines()]
    return {name: value for value, name in lines}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
