"""What token files and a blend are, from their indexes alone: sizes, lengths, packing, and the ledger of any token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dla_train.config import Config
from dla_train.data.loader import BatchSource
from dla_train.data.token_file import TokenFile
from dla_train.text_tables import aligned

PERCENTILES = (0, 10, 50, 90, 99, 100)


@dataclass(frozen=True)
class FileFacts:
    """One prefix."""

    prefix: str
    documents: int
    tokens: int
    dtype: str
    bytes_on_disk: int
    length_percentiles: dict[int, int]
    """Tokens of a document at PERCENTILES."""
    tokenizer: str | None
    """Name and fingerprint from the manifest; None without one."""
    special_tokens: str | None
    """Which of BOS and EOS every document has."""
    text_bytes: int | None


def file_facts(file: TokenFile) -> FileFacts:
    """Facts of an opened pair; reads no token."""
    manifest = file.manifest
    special = None
    if manifest is not None:
        special = "+".join(name for name, there in (("BOS", manifest.bos), ("EOS", manifest.eos)) if there) or "none"
    found = np.percentile(file.lengths, PERCENTILES, method="nearest").astype(np.int64).tolist()
    return FileFacts(
        prefix=file.prefix,
        documents=len(file.lengths),
        tokens=file.tokens,
        dtype=str(file.dtype),
        bytes_on_disk=file.tokens * file.dtype.itemsize,
        length_percentiles=dict(zip(PERCENTILES, found, strict=True)),
        tokenizer=f"{manifest.tokenizer} ({manifest.tokenizer_fingerprint[:12]})" if manifest else None,
        special_tokens=special,
        text_bytes=manifest.text_bytes if manifest else None,
    )


def facts_text(facts: list[FileFacts]) -> str:
    """The facts as a table for a terminal, a line each prefix, with a sum."""
    heads = ["prefix", "documents", "tokens", "type", *(f"p{p}" for p in PERCENTILES), "bytes/token", "specials"]
    lines = [
        [
            f.prefix,
            f"{f.documents:,}",
            f"{f.tokens:,}",
            f.dtype,
            *(f"{f.length_percentiles[p]:,}" for p in PERCENTILES),
            "-" if f.text_bytes is None else f"{f.text_bytes / f.tokens:.2f}",
            f.special_tokens or "-",
        ]
        for f in facts
    ]
    if len(facts) > 1:
        blank = ["" for _ in heads[3:]]
        lines.append(["sum", f"{sum(f.documents for f in facts):,}", f"{sum(f.tokens for f in facts):,}", *blank])
    return aligned([heads, *lines])


def blend_facts(config: Config, batches: BatchSource, at_tokens: list[int]) -> dict[str, Any]:
    """Sources, phases and ledgers of a run as plain values: at every phase's start, at `at_tokens`, at the end."""
    step_tokens, blend = batches.tokens_per_step, batches.blend
    steps = {phase.start_step for phase in blend.phases} | {-(-tokens // step_tokens) for tokens in at_tokens}
    return {
        "tokens_per_step": step_tokens,
        "packing": config.data.packing,
        "sources": {
            name: asdict(source.report()) | {"rows_per_epoch": source.rows_per_epoch}
            for name, source in sorted(batches.sources.items())
        },
        "phases": blend.timeline(config.train.steps),
        "ledger": {
            step * step_tokens: {entry.name: asdict(entry) for entry in batches.ledger(step)}
            for step in sorted(steps | {config.train.steps})
        },
    }


def blend_text(facts: dict[str, Any]) -> str:
    """The blend's facts for a terminal."""
    sources, phases, ledger = facts["sources"], facts["phases"], facts["ledger"]
    heads = ["source", "tokens", "rows an epoch", "padding", "documents split", "tokens after a cut"]
    packed = [
        [
            name,
            f"{s['tokens']:,}",
            f"{s['rows_per_epoch']:,}",
            f"{s['padding_tokens'] / (s['padding_tokens'] + s['tokens']):.4%}",
            f"{s['split_documents']:,} ({s['split_documents'] / s['documents']:.1%})",
            f"{s['shortened_tokens']:,} ({s['shortened_tokens'] / s['tokens']:.1%})",
        ]
        for name, s in sources.items()
    ]
    plan = [
        [
            f"{phase['start_step']:,}",
            f"{phase['start_step'] * facts['tokens_per_step']:,}",
            str(phase["context_tokens"]),
            ", ".join(f"{name} {float(Fraction(weight)):.4f}" for name, weight in phase["weights"].items()),
        ]
        for phase in phases
    ]
    read = [
        [f"{tokens:,}", *(f"{entries[name]['tokens']:,} ({entries[name]['epochs']:.3f})" for name in sources)]
        for tokens, entries in ledger.items()
    ]
    return "\n".join(
        [
            f"packing {facts['packing']}:",
            aligned([heads, *packed]),
            "\nphases:",
            aligned([["from step", "from token", "context", "weights"], *plan]),
            "\nledger, tokens (epochs) read of each source:",
            aligned([["after token", *sources], *read]),
        ]
    )


def draw_lengths(files: list[TokenFile], output: Path) -> None:
    """Write a PNG: per prefix, documents and tokens by document length, on a logarithmic axis."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    documents, tokens = figure.subplots(2, 1, sharex=True)
    longest = max(int(file.lengths.max()) for file in files)
    edges = np.unique(np.geomspace(1, longest + 1, 61).astype(np.int64))
    for file in files:
        name = Path(file.prefix).name
        documents.stairs(np.histogram(file.lengths, edges)[0], edges, label=f"{name}: {len(file.lengths):,} documents")
        weights = np.histogram(file.lengths, edges, weights=file.lengths)[0]
        tokens.stairs(weights / file.tokens, edges, label=f"{name}: {file.tokens:,} tokens")
    documents.set_ylabel("documents")
    tokens.set_ylabel("share of tokens")
    tokens.set_xlabel("tokens in a document")
    for axes in (documents, tokens):
        axes.set_xscale("log")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
