"""The fault suite: `python -m tests.faults.suite --output FOLDER` hurts runs in every way and prints what was lost.

Seeded: the same seed hurts at the same moments, as far as clocks allow. Two ranks on this machine; docs/reliability.md
says what is promised and what this does not cover.
"""

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from dla_kernels.markdown import markdown_table
from tests.faults import trials
from tests.faults.trials import LAYOUTS, Outcome, Trial

FILES = ("COMPLETE", "manifest", "trainer", "model-", "optim-", "rng-")
KILLS_A_RUN = 5
COLUMNS = ("runs", "injected", "starts", "survived", "lost")
PLANTED = ("loss", "gradient", "weight", "disk", "hang")

Plan = tuple[str, Callable[[Trial, Trial, float, random.Random], Outcome]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.suite", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for faults.json and faults.md")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs of ranks (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of every other fault (default %(default)s)")
    parser.add_argument("--short", action="store_true", help="one run of each class alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    warm()
    with tempfile.TemporaryDirectory() as folder:
        plans = list(short_plan() if options.short else plan(options.kills, options.rounds))
        outcomes = run(Path(folder), plans, options.seed, 0 if options.short else options.kills)
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"seed": options.seed, "ranks": trials.RANKS, "steps": trials.STEPS, "faults": summary(outcomes)}
    (options.output / "faults.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.output / "faults.md").write_text(table(record), encoding="utf-8")
    print(table(record))
    for outcome in outcomes:
        for wrong in outcome.wrong:
            print(f"LOST: {outcome.fault}, {outcome.layout}: {wrong}", file=sys.stderr)
    return int(any(outcome.wrong for outcome in outcomes))


def warm() -> None:
    """Import what every rank needs, once."""
    import torch

    torch.set_num_threads(1)
    import dla_train.train  # noqa: F401
    from dla_train.engine.zero_settings import import_deepspeed
    from dla_train.parallel.mesh import _parallel_state

    import_deepspeed()
    _parallel_state()


def run(folder: Path, plans: list[Plan], seed: int, kills: int) -> list[Outcome]:
    """Every trial, and up to twice the trials of kills while fewer than `kills` met a run that was not yet finished."""
    from tests.train.runs import write_corpus

    corpus = write_corpus(folder / "corpus")
    wholes: dict[str, tuple[Trial, float]] = {}
    outcomes: list[Outcome] = []
    most = len(plans) + kills // KILLS_A_RUN
    bar = tqdm(total=len(plans), desc="faults", mininterval=5)
    for number in itertools.count():
        if number == len(plans):
            if number == most or sum(o.injected for o in outcomes if o.fault == trials.KILLED_RANK) >= kills:
                break
            plans.append(kill_plan(number))
            bar.total = len(plans)
        layout, hurt = plans[number]
        if layout not in wholes:
            wholes[layout] = trials.uninterrupted(folder / f"whole_{len(wholes)}", corpus, layout)
        whole, seconds = wholes[layout]
        trial = Trial(folder / str(number), corpus, layout)
        try:
            outcomes.append(hurt(trial, whole, seconds, random.Random(f"{seed}:{number}")))
        except (OSError, ValueError, KeyError) as error:  # what a trial looks for is not there
            outcomes.append(Outcome("broken trial", layout, wrong=[f"{number}: {error!r}"]))
        if outcomes[-1].survived:
            trial.remove()
        bar.update()
    bar.close()
    return outcomes


def plan(kills: int, rounds: int) -> Iterator[Plan]:
    """(layout, trial) of the whole suite."""
    layouts = list(LAYOUTS)
    yield from (kill_plan(number) for number in range(-(-kills // KILLS_A_RUN)))
    for turn in range(rounds):
        layout = layouts[turn % len(layouts)]
        yield layout, trials.launcher_kill
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            yield layout, lambda t, w, s, d, number=number: trials.signals(t, w, number, trials.at_random(s, d))
        for kind in FILES:
            for how in ("flipped bit", "truncation"):
                yield layout, lambda t, w, s, d, kind=kind, how=how: trials.damage(t, w, kind, how, d)
        for fault in PLANTED:
            yield layout, lambda t, w, s, d, fault=fault: trials.planted(t, w, fault, d)


def kill_plan(number: int) -> Plan:
    """Several kills of one run at any time, in a layout by turns."""

    def hurt(trial: Trial, whole: Trial, seconds: float, dice: random.Random) -> Outcome:
        return trials.kills(trial, whole, [trials.at_random(seconds, dice, 0.0, 1.0)] * KILLS_A_RUN, dice)

    return list(LAYOUTS)[number % len(LAYOUTS)], hurt


def short_plan() -> Iterator[Plan]:
    """One run of each class, in two layouts, hurt after some step: at a random moment a run may be over."""
    local, divided = "local, data 2", "local, tensor 2"
    yield divided, lambda t, w, s, d: trials.kills(t, w, [trials.after_step(step) for step in (1, 3, 5)], d)
    yield local, lambda t, w, s, d: trials.signals(t, w, signal.SIGTERM, trials.after_step(3))
    yield divided, lambda t, w, s, d: trials.damage(t, w, "model-", "flipped bit", d)
    yield local, lambda t, w, s, d: trials.planted(t, w, "weight", d)
    yield local, lambda t, w, s, d: trials.planted(t, w, "disk", d)


def summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Counts by fault."""
    rows: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        row = rows.setdefault(outcome.fault, dict.fromkeys(COLUMNS, 0))
        row["runs"] += 1
        row["injected"] += outcome.injected
        row["survived"] += outcome.survived
        row["starts"] += outcome.starts
        row["lost"] += not outcome.survived
    return rows


def table(record: dict) -> str:
    """The results as Markdown."""
    setting = f"{record['ranks']} ranks on one machine, {record['steps']} steps, a checkpoint after each"
    total = {key: sum(row[key] for row in record["faults"].values()) for key in COLUMNS}
    counts = record["faults"] | {"**all**": total}
    rows = [[fault, *(str(row[key]) for key in COLUMNS)] for fault, row in counts.items()]
    lines = [
        "# Faults",
        "",
        f"Made by `make test-faults`: {setting}, seed {record['seed']};",
        f"{'; '.join(LAYOUTS)} in turn. *Survived*: the run went on and ended with the weights, moments and numbers of",
        "one that nobody hurt, bit for bit, or, where steps are left out by design (numbers that are not finite), with",
        "every step logged and finite weights. *Lost*: runs that did not.",
        "",
        markdown_table(["fault", *COLUMNS], rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    sys.exit(code)
