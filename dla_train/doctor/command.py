"""The program `dla-doctor`: checks of a run before it is started, one line each. Starts no training and leaves nothing.

It takes what `dla-train` takes, and options of its own:

  dla-doctor experiment=quickstart                                        # this machine, these settings and files
  dla-doctor experiment=... doctor.world_size=64                          # legal on 64 ranks?
  dla-launch launcher.program=doctor launcher.ranks_per_node=8 experiment=...   # the ranks too, on their machines

  doctor.world_size=N      ranks that settings are checked for (default: those that run this, or tensor x context)
  doctor.disk_mb=256       size of the file that measures the disk of run_dir; 0 leaves it out
  doctor.reduce_mb=64      size of the all-reduce
  doctor.json=PATH         write the findings as JSON too; `-` prints that alone

Exit code 0: every check is ok or a warning; 1: a check failed; 2: the command line is wrong.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from dla_train.config import MISTAKE, Config, ConfigError
from dla_train.doctor.findings import FAILED, Finding, failed, joined
from dla_train.doctor.inputs import check_inputs
from dla_train.doctor.machine import check_devices, check_versions
from dla_train.doctor.ranks import check_ranks, rank_name
from dla_train.doctor.run_folder import check_disk, check_run_folder
from dla_train.doctor.settings import check_memory, check_settings
from dla_train.hydra_app import compose
from dla_train.parallel.mesh import Mesh

PREFIX = "doctor."
FOUND = 1
LONGEST_WAIT_MINUTES = 2.0
"""In a collective, where the run itself may be given more."""


@dataclass(frozen=True)
class Options:
    """Words of the command line that are not settings of the run."""

    world_size: int = 0
    disk_mb: int = 256
    reduce_mb: int = 64
    json: str = ""

    @classmethod
    def parse(cls, words: Sequence[str]) -> Options:
        """From the words of a command line that begin with PREFIX. Raises ConfigError naming the option."""
        given = {key: value for key, _, value in (word.removeprefix(PREFIX).partition("=") for word in words)}
        names = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in names:
                raise ConfigError(f"{PREFIX}{key} is not an option; choose from {', '.join(names)}")
        values: dict[str, int] = {}
        for key in ("world_size", "disk_mb", "reduce_mb"):
            word = given.get(key, "0" if key == "world_size" else str(getattr(cls, key)))
            if not word.isdigit() or (key == "reduce_mb" and word == "0"):
                raise ConfigError(f"{PREFIX}{key}={word} is not a whole number; use {PREFIX}{key}=64 or the like")
            values[key] = int(word)
        return cls(**values, json=given.get("json", ""))


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Check, print on rank 0, and return the exit code, the same on every rank."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    own, settings = split(arguments)
    try:
        options, config = Options.parse(own), compose(settings)
    except ConfigError as error:
        if _first():
            print(f"dla-doctor: error: {error}", file=sys.stderr)
        return MISTAKE
    found = examine(config, options)
    if _first():
        _tell(found, options.json)
    return FOUND if failed(found) else 0


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options of this program, settings of the run)."""
    own = [word for word in arguments if word.startswith(PREFIX)]
    return own, [word for word in arguments if word not in own]


def preflight(config: Config, world_size: int) -> list[Finding]:
    """What can be checked in a moment and without the ranks: settings, tokenizer, files, run_dir and its room."""
    settings = check_settings(config, world_size)
    if failed(settings):
        return settings
    inputs, sources = check_inputs(config)
    return [*settings, *inputs, *check_run_folder(config, sources)]


def examine(config: Config, options: Options) -> list[Finding]:
    """Every check, on every rank that runs this; the findings of all. Collective."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    world_size = options.world_size or (ranks if ranks > 1 else config.parallel.tensor * config.parallel.context)
    settings = check_settings(config, world_size)
    if failed(settings):  # the same on every rank, and nothing else can be told
        return settings
    here = [*check_versions(config), check_devices(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))]
    if config.train.device != "cpu" and torch.cuda.is_available():
        here += check_memory(config, world_size, torch.cuda.get_device_properties(0).total_memory)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine
        here += _of_files(config, options)
    return _together(config, options, [*settings, *here])


def _of_files(config: Config, options: Options) -> list[Finding]:
    inputs, sources = check_inputs(config)
    folder = check_run_folder(config, sources)
    found = [*inputs, *folder]
    if options.disk_mb and not failed(folder):
        found.append(check_disk(config, options.disk_mb * 10**6))
    return found


def _together(config: Config, options: Options, here: list[Finding]) -> list[Finding]:
    """What all ranks found, and how they are together."""
    single = dataclasses.replace(
        config.parallel,
        tensor=1,
        context=1,
        sequence=False,
        timeout_minutes=min(config.parallel.timeout_minutes, LONGEST_WAIT_MINUTES),
    )
    try:
        with Mesh.start(dataclasses.replace(config, parallel=single)) as mesh:
            found = joined(mesh.gather(here), mesh.gather(rank_name(mesh)))
            return [*found, *check_ranks(mesh, options.reduce_mb * 10**6)]
    except (ConfigError, dist.DistError, RuntimeError) as error:
        mend = "look at the other ranks' logs, the network between the hosts (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        return [*here, Finding("ranks", FAILED, f"{str(error).splitlines()[0]}; {mend}")]


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _tell(found: Sequence[Finding], where: str) -> None:
    values = json.dumps({"failed": failed(found), "findings": [dataclasses.asdict(item) for item in found]}, indent=1)
    if where == "-":
        print(values)
        return
    for finding in found:
        print(finding.line())
    if where:
        Path(where).write_text(values + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
