"""The program `dla-plan`: the dry run of a training command line. Starts nothing and needs no device.

It takes what `dla-train` takes, and options of its own:

  dla-plan experiment=paper_mamba2_780m_dla parallel.context=4 world_size=64
  dla-plan experiment=... world_size=8 mfu=0.35 peak_tflops=312 device_gb=40 json=plan.json
  dla-plan layouts=docs/results/layouts.md       # the worked table of the paper's models

  world_size=N      ranks (default: parallel.tensor x parallel.context)
  mfu=0.4           share of the peak that is assumed to be reached
  peak_tflops=989   of one device
  device=cuda       what train.device=auto stands for: cuda or cpu
  device_gb=80      memory that a run may use, 1e9 bytes
  packed=true       rows hold several documents
  json=PATH         write the plan as JSON too
  layouts=PATH      write the table of layouts instead, and its JSON beside it

Exit code 0: the run is legal and fits; 1: it is not or does not; 2: the command line is wrong.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from dla_train.config import MISTAKE, ConfigError
from dla_train.hydra_app import compose
from dla_train.plan_run.layout import Layout
from dla_train.plan_run.plan import plan
from dla_train.plan_run.report import report, write_json
from dla_train.plan_run.target import Target
from dla_train.plan_run.worked import write_worked

OPTIONS = (*(item.name for item in fields(Target)), "json", "layouts")


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Print the plan of a command line. Returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        return _run(arguments)
    except ConfigError as error:
        print(f"dla-plan: error: {error}", file=sys.stderr)
        return MISTAKE


def _run(arguments: list[str]) -> int:
    options = {key: value for key, _, value in (word.partition("=") for word in arguments) if key in OPTIONS}
    overrides = [word for word in arguments if word.partition("=")[0] not in OPTIONS]
    target = Target.parse(options)
    if "layouts" in options:
        if overrides:
            raise ConfigError(f"layouts= plans the paper's models and takes no settings; leave out {overrides[0]}")
        write_worked(Path(options["layouts"]), target)
        return 0
    config = compose(overrides, OPTIONS)
    planned = plan(config, Layout.of(config, target.world_size), target)
    print(report(planned), end="")
    if "json" in options:
        write_json([planned], Path(options["json"]))
    return 0 if planned.legal and planned.fits else 1


if __name__ == "__main__":
    main()
