"""Points of Hydra's own multirun: `dla-train --multirun optim.lr=1e-3,3e-3 hydra/launcher=joblib`.

Hydra's launcher plugins call the program one point after the other, in a pool of processes, or in jobs of a cluster.
None of these is a place to train in: a run has signals, ranks and an exit code of its own. So wherever it is called, a
point starts `dla-train` as a process, or torchrun where several ranks are asked for, and waits for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from dla_train.config import ConfigError
from dla_train.hydra_app import checked_config, config_directory
from dla_train.run_process import quoted, run_to_end

RANKS = "RANKS"
"""Variable with the number of processes of each point, as launch/torchrun.sh has it; one where it is not set."""


def fixed_keys(words: Sequence[str]) -> frozenset[str]:
    """Settings that have one value on a multirun's command line, the same in every point."""
    given = [word for word in words if "=" in word and not word.startswith("-")]
    with contextlib.suppress(HydraException):  # which Hydra will tell
        parsed = OverridesParser.create().parse_overrides(given)
        keys = {str(override.key_or_group): override.is_sweep_override() for override in parsed}  # the last one counts
        return frozenset(key for key, swept in keys.items() if not swept)
    return frozenset()


def run_point(composed: DictConfig, fixed: frozenset[str]) -> None:
    """Train a point in a folder of run_dir that its settings but the `fixed` ones name, and wait for its end.

    Raises ConfigError, PointError.
    """
    given, ranks = HydraConfig.get(), _ranks_asked()
    for key in ("nodes", "tasks_per_node"):  # of submitit: each of its tasks would start the same run
        if (value := int(given.launcher.get(key) or 1)) > 1:
            raise ConfigError(
                f"hydra.launcher.{key}={value}: a point is one task; {RANKS}={value} starts its processes"
            )
    config = checked_config(composed, ranks)
    words = {word.partition("=")[0].lstrip("+~"): word for word in given.overrides.task}
    own = "+".join(sorted(word for key, word in words.items() if key not in fixed))
    run_dir = str(Path(config.run_dir) / (own.replace("/", "_") or "default"))
    print(f"dla-train: {run_dir} starts", flush=True)
    run_to_end([*_point_words(), f"run_dir={quoted(run_dir)}"], ranks, run_dir)


def _point_words() -> list[str]:
    """What Hydra was told of where configurations lie, and the point's settings."""
    given, flags = HydraConfig.get(), {"main": "--config-path", "command-line": "--config-dir"}
    sources = [source for source in given.runtime.config_sources if source.provider in flags]
    others = [source for source in sources if source.path != str(config_directory())]
    where = [word for source in others for word in (flags[source.provider], source.path)]
    search = [word for word in given.overrides.hydra if word.startswith("hydra.searchpath=")]
    return [*where, "--config-name", str(given.job.config_name), *search, *given.overrides.task]


def _ranks_asked() -> int:
    """Processes of each point of a multirun. Raises ConfigError."""
    given = os.environ.get(RANKS, "1")
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"{RANKS}={given} is not a number of processes; use 1 or more, or leave it out")
    return int(given)
