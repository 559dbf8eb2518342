"""The program `dla-recall`: does a memory hold more? Paired training of small models on recall tasks.

  dla-recall                                             # configs/study/paired_token.yaml; the same command goes on
  dla-recall study=ablation seeds=[0,1,2] processes=2    # another study
  dla-recall study=paired_token steps=500 seeds=[0] output=runs/quick
  dla-recall probe                                       # no training: who isolates needles, how memories fill
  dla-recall render docs/results/recall docs/images      # the pages and pictures of every NAME.json in a folder

Writes NAME.json, NAME.md and two pictures into `output`, and one JSON a run into its folder `runs`. Exit code 0, 1
where a run failed, 2 after a mistake that is explained, 130 after SIGINT or SIGTERM. Settings (meanings:
dla_train/recall/settings.py; studies: configs/study/):
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType

from dla_train.config import MISTAKE, ConfigError
from dla_train.recall.probe import merge_table, probe_table
from dla_train.recall.report import write_page
from dla_train.recall.results import read_results, write_results
from dla_train.recall.runs import output_folder, run_study
from dla_train.recall.settings import StudyConfig, compose
from dla_train.recall.tasks.errors import RecallError

STOPPED = 130
"""Exit code after SIGINT or SIGTERM."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dla-recall`; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(words):
        print(__doc__ + "\n".join(f"  {item.name}" for item in dataclasses.fields(StudyConfig)))
        return 0
    if words == ["probe"]:
        print(probe_table(), merge_table(), sep="\n\n")
        return 0
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        if words[:1] == ["render"]:
            return render(words[1:])
        study = compose(words)
        runs = run_study(study)
        folder = output_folder(study)
        write_results(study, runs, folder / f"{study.name}.json")
        print(write_page(study, runs, folder, folder))
    except (ConfigError, RecallError, OSError) as error:
        print(f"dla-recall: error: {error}", file=sys.stderr)
        return MISTAKE
    except BrokenProcessPool:
        print(
            "dla-recall: error: a run's process was killed, perhaps for memory; use fewer processes=", file=sys.stderr
        )
        return MISTAKE
    except KeyboardInterrupt:
        print("dla-recall: stopped; finished runs are kept, and the same command goes on", file=sys.stderr)
        return STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)
    return 1 if runs.failures else 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def render(words: Sequence[str]) -> int:
    """Make the pages and pictures of a folder's results again: FOLDER, and a folder for the pictures."""
    if not 1 <= len(words) <= 2:
        raise ConfigError(f"render takes a folder, and one for the pictures, not {len(words)} words")
    folder = Path(words[0])
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ConfigError(f"{folder} holds no .json; name the folder of a study's results")
    for file in files:
        study, runs = read_results(file)
        write_page(study, runs, folder, Path(words[-1]))
        print(f"{folder / study.name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
