"""The program `dla-diagnose`: compare checkpoints by position, length of text and recall.

  dla-diagnose runs=[runs/single,runs/dla]                            # the first run's validation files
  dla-diagnose runs=[runs/single,runs/dla] data=[data/books] context_tokens=32768 documents=256 output=diagnostics/books
  dla-diagnose runs=[runs/dla@1000,runs/dla] names=[early,late]       # two checkpoints of one run
  dla-diagnose seeds=[out/seed_0,out/seed_1,out/seed_2] output=out/seeds    # comparisons of three seeds as one

Writes diagnostics.json, .npz and .md, and pictures of the loss by position, by length and by the distance of what is
recalled into `output`. Exit code 0, or 2 after a mistake that is explained. Settings and defaults (meanings:
dla_train/diagnose/settings.py):
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dla_train.checkpoint.errors import CheckpointError
from dla_train.config import MISTAKE, ConfigError
from dla_train.data.errors import DataError
from dla_train.diagnose.arms import losses_of, open_arms, open_documents
from dla_train.diagnose.comparison import compare, default_lengths
from dla_train.diagnose.recalled import recall_distances
from dla_train.diagnose.report import write_report, write_seeds
from dla_train.diagnose.seeds import compare_seeds, read_seeds
from dla_train.diagnose.settings import DiagnoseConfig, read_settings
from dla_train.evaluate.bands import Bands
from dla_train.hydra_app import defaults_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dla-diagnose`; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or {"-h", "--help"} & set(words):
        print(f"{__doc__}{defaults_of(DiagnoseConfig)}")
        return 0 if words else MISTAKE
    try:
        settings = read_settings(words)
        print(diagnose_seeds(settings) if settings.seeds else diagnose(settings))
    except (ConfigError, CheckpointError, DataError, OSError) as error:
        print(f"dla-diagnose: error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


def diagnose(settings: DiagnoseConfig) -> str:
    """Compare and write the report; returns its tables. Raises typed errors before anything is computed."""
    arms = open_arms(settings)
    files, documents = open_documents(settings, arms)
    lengths = settings.lengths or default_lengths(documents.positions)
    wrong = [length for length in lengths if not 1 <= length <= documents.positions]
    if wrong:
        raise ConfigError(f"lengths={wrong} lie outside 1 to context_tokens={documents.positions}; leave them out")
    try:
        Bands.of(documents.positions, settings.band_edges)
    except ValueError as error:
        raise ConfigError(f"band_edges: {error}; sort them inside context_tokens") from error
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    losses = {arm.name: losses_of(arm, documents, settings) for arm in arms}
    found = compare(
        losses,
        recall_distances(documents),
        band_edges=settings.band_edges,
        lengths=sorted(lengths),
        bins_per_doubling=settings.bins_per_doubling,
        confidence=settings.confidence,
    )
    return write_report(settings, arms, files, documents, losses, found)


def diagnose_seeds(settings: DiagnoseConfig) -> str:
    """Compare over seeds what was compared with each, and write the report; returns its tables. Raises ConfigError."""
    reports = read_seeds(settings.seeds)
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    return write_seeds(settings, reports, compare_seeds(reports, settings.confidence))


if __name__ == "__main__":
    sys.exit(main())
