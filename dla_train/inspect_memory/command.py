"""The program `dla-inspect`: what the memories of a checkpoint do with a text.

  dla-inspect run=runs/dla file=text.txt                        # every head, in one page
  dla-inspect run=runs/dla step=1000 text='abc abd' layer=1 head=2 output=inspection/early
  git log | dla-inspect run=runs/dla file=- max_tokens=4096

Writes into `output`: index.html, in which every chosen head can be looked through (it loads nothing, so it can be sent
to someone), and merge_map.png, slot_timeline.png and read_weights.png of one head: of several, the one whose boundaries
are nearest to memory.target_boundary_rate. Exit code 0, or 2 after a mistake that is explained. Settings and defaults
(meanings: dla_train/inspect_memory/settings.py):
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dla_train.checkpoint.errors import CheckpointError
from dla_train.config import MISTAKE, ConfigError
from dla_train.data.errors import DataError
from dla_train.data.tokenizer import load_tokenizer
from dla_train.evaluate.loading import load_model
from dla_train.hydra_app import defaults_of
from dla_train.inspect_memory.history import inspect_text
from dla_train.inspect_memory.merge_map import plot_merge_map
from dla_train.inspect_memory.page import write_page
from dla_train.inspect_memory.settings import ALL, InspectConfig, read_settings, read_text
from dla_train.inspect_memory.timelines import plot_read_weights, plot_slot_timeline
from dla_train.optim import gate_temperature
from dla_train.parallel.mesh import pick_device

PICTURES = ("merge_map", "slot_timeline", "read_weights")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dla-inspect`; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or {"-h", "--help"} & set(words):
        print(f"{__doc__}{defaults_of(InspectConfig)}")
        return 0 if words else MISTAKE
    try:
        for path in inspect(read_settings(words)):
            print(path)
    except (ConfigError, CheckpointError, DataError, OSError) as error:
        print(f"dla-inspect: error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


def inspect(settings: InspectConfig) -> list[Path]:
    """Write page and pictures; returns the files. Raises typed errors before anything is written."""
    text = read_text(settings)
    device = pick_device(settings.device, "device")
    model, config, step = load_model(settings.run, settings.step or None, device, dtype=settings.dtype or None)
    layer, head = (None if value == ALL else int(value) for value in (settings.layer, settings.head))
    found = inspect_text(
        model,
        load_tokenizer(config.data.tokenizer),
        text,
        layer=layer,
        head=head,
        gate_temperature=gate_temperature(config.memory, config.train.steps, max(step, 1)),
        max_tokens=settings.max_tokens,
    )
    chosen = found.typical(config.memory.target_boundary_rate)
    title, folder = f"{config.name}, step {step}", Path(settings.output)
    facts = [f"{config.model.backbone} x {config.memory.policy}", f"{len(found.pieces)} tokens"]
    page, pictures = folder / "index.html", [folder / f"{name}.png" for name in PICTURES]
    write_page(found, page, title=title, facts=facts, chosen=chosen)
    plot_merge_map(found.pieces, chosen, pictures[0], title=title)
    plot_slot_timeline(chosen, pictures[1], title=title)
    plot_read_weights(chosen, pictures[2], title=title)
    return [page, *pictures]


if __name__ == "__main__":
    sys.exit(main())
