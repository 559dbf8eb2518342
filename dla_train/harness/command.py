"""The program `dla-evaluate`: a checkpoint on published tasks, beside the published numbers.

  dla-evaluate run=RUN_DIR suite=commonsense data_dir=data/evaluation    # the same command again goes on
  dla-evaluate run=RUN_DIR suite=all data_dir=data/evaluation tasks=[piqa,swde] limit=100
  torchrun --nproc-per-node=8 -m dla_train.harness.command run=RUN_DIR suite=all data_dir=data/evaluation    # 8 devices
  dla-evaluate fetch suite=all data_dir=data/evaluation                  # once, with a network: writes the local copies

Suites: commonsense, retrieval, ruler, longbench, all, wikitext (configs/suite). Exit code 0; 2 after a mistake; 75
where it was interrupted: the same command goes on. Settings and defaults (meanings: dla_train/harness/settings.py):
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from dla_train.checkpoint.errors import CheckpointError, RunDirectoryError
from dla_train.config import MISTAKE, ConfigError
from dla_train.data.errors import DataError
from dla_train.harness.errors import EvaluateError
from dla_train.harness.fetch import fetch
from dla_train.harness.settings import compose, defaults
from dla_train.resilience.exit_codes import STOPPED


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or {"-h", "--help"} & set(words):
        print(f"{__doc__}{defaults()}")
        return 0 if words else MISTAKE
    try:
        if words[0] == "fetch":
            fetch(compose(["run=none", *words[1:]]))
        else:
            _evaluate(words)
    except (ConfigError, EvaluateError, CheckpointError, RunDirectoryError, DataError, OSError) as error:
        print(f"dla-evaluate: error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("dla-evaluate: stopped; the same command goes on from here", file=sys.stderr)
        return STOPPED
    return 0


def _evaluate(words: Sequence[str]) -> None:
    config = compose(words)
    if find_spec("lm_eval") is None:
        raise EvaluateError("lm_eval is not installed; run `pip install dla-train[evaluate]`")
    from dla_train.harness.evaluation import TABLE, evaluate

    output = evaluate(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{(output / TABLE).read_text(encoding='utf-8')}\nresults: {output}")


if __name__ == "__main__":
    sys.exit(main())
