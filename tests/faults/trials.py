"""One trial: a run is hurt, started again as often as it takes, and compared with one that nobody hurt."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dla_train.checkpoint.folders import complete_steps
from dla_train.resilience.exit_codes import HUNG, STOPPED, read_status
from tests.faults.planted import FAULTS
from tests.faults.processes import Job, start
from tests.train.runs import TINY, numbers_of, tensors_of

RANKS, STEPS = 2, 14
SETTINGS = (
    *TINY,
    f"train.steps={STEPS}",
    "train.micro_batch_rows=2",
    "checkpoint.interval_steps=1",
    "memory.tau_control=rate",
    "data.loader_workers=1",
    "resilience.step_minutes=0.2",
    "resilience.first_step_minutes=1",
)
LAYOUTS: dict[str, tuple[str, ...]] = {
    "local, data 2": (),
    "local, tensor 2": ("parallel.tensor=2",),
    "ZeRO 1, data 2": ("engine=deepspeed", "engine.zero_stage=1"),
    "ZeRO 3, data 2": ("engine=deepspeed", "engine.zero_stage=3"),
}
KILLED_RANK = "SIGKILL of a rank"
START_SECONDS = 60.0
"""Longest wait for a job to end by itself."""


@dataclass
class Outcome:
    """What became of a trial."""

    fault: str
    layout: str
    injected: int = 0
    """Faults that hit a running job."""
    starts: int = 0
    wrong: list[str] = field(default_factory=list)
    """What differs from the run that nobody hurt, or went otherwise than promised."""

    @property
    def survived(self) -> bool:
        return not self.wrong


class Trial:
    """A run directory and the jobs started in it."""

    def __init__(self, folder: Path, corpus: Sequence[str], layout: str) -> None:
        self.folder, self.layout = folder, layout
        self.run_dir = folder / "run"
        self._overrides = [*SETTINGS, *corpus, *LAYOUTS[layout], f"run_dir={self.run_dir}"]
        folder.mkdir(parents=True)

    def start(self, *more: str, fault: str = "", rank: int = 0, argument: int = 0) -> Job:
        """Start a job, with a fault planted on one rank (-1: on all)."""
        overrides = [*self._overrides, *more]

        def job(own: int) -> int:
            from dla_train.hydra_app import compose
            from dla_train.train import configure_logging, train

            torch.set_num_threads(1)
            configure_logging()
            if fault and rank in (own, -1):
                FAULTS[fault](argument)
            return STOPPED if train(compose(overrides)).stopped_by else 0

        return start(job, RANKS, self.folder / "log")

    def finish(self, outcome: Outcome) -> None:
        """Start until the run is finished."""
        for _ in range(4):
            outcome.starts += 1
            if (code := self.start().wait(START_SECONDS)) == 0:
                return
        outcome.wrong.append(f"not finished: exit code {code}, {(self.folder / 'log').read_text()[-600:]}")

    def compare(self, whole: "Trial", outcome: Outcome) -> None:
        """Every weight, moment and number of every step must be those of a run that nobody hurt."""
        if outcome.wrong:
            return
        names = ("loss", "grad_norm", "lr", "boundary_rate", "live_slots", "tau")
        if numbers_of(self.run_dir, *names) != numbers_of(whole.run_dir, *names):
            outcome.wrong.append("losses differ")
        expected, found = tensors_of(whole.run_dir, STEPS), tensors_of(self.run_dir, STEPS)
        outcome.wrong += [n for n, x in expected.items() if not n.startswith("rng/") and not torch.equal(found[n], x)]
        self.check_status("finished", 0, outcome)

    def check_status(self, state: str, code: int | None, outcome: Outcome) -> None:
        """status.json must say how the run stands."""
        status = read_status(self.run_dir) or {}
        if (status.get("state"), status.get("exit_code")) != (state, code):
            outcome.wrong.append(f"status.json says {status}")

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.folder)


Moment = Callable[[Trial, Job], None]
"""Waits in a trial whose job was started."""


def uninterrupted(folder: Path, corpus: Sequence[str], layout: str) -> tuple[Trial, float]:
    """A run that nobody hurts, and the seconds of one in a warm process."""
    trial = Trial(folder, corpus, layout)
    started = time.monotonic()
    code = trial.start().wait(120)
    assert code == 0, (trial.folder / "log").read_text()[-3000:]
    return trial, time.monotonic() - started


def kills(trial: Trial, whole: Trial, moments: Sequence[Moment], dice: random.Random) -> Outcome:
    """SIGKILL to a random rank at each of some moments, each followed by a start."""
    outcome = Outcome(KILLED_RANK, trial.layout)
    for moment in moments:
        outcome.starts += 1
        job = trial.start()
        moment(trial, job)
        job.send(signal.SIGKILL, rank=dice.randrange(RANKS))
        code = job.wait(START_SECONDS)
        outcome.injected += code != 0
        if code is None:
            outcome.wrong.append("ranks of a killed one did not end")
            job.send_all(signal.SIGKILL)
            break
        if code == 0:
            break  # the run was finished before
    trial.finish(outcome)
    trial.compare(whole, outcome)
    return outcome


def at_random(seconds: float, dice: random.Random, first: float = 0.15, last: float = 0.9) -> Moment:
    """A moment in some part of a run's time, of which its start is one: it may not be ready yet, or be over."""
    return lambda trial, job: time.sleep(dice.uniform(first, last) * seconds)


def after_step(step: int) -> Moment:
    """The moment at which a step's checkpoint is complete: in the middle of the run, however fast it is."""

    def moment(trial: Trial, job: Job) -> None:
        end, saved = time.monotonic() + START_SECONDS, trial.run_dir / "checkpoints"
        while job.alive() and time.monotonic() < end and max(complete_steps(saved), default=0) < step:
            time.sleep(0.01)

    return moment


def launcher_kill(trial: Trial, whole: Trial, seconds: float, dice: random.Random) -> Outcome:
    """SIGKILL to the launcher: its ranks train on, and a second job must not touch their directory meanwhile."""
    outcome = Outcome("SIGKILL of the launcher", trial.layout, starts=1)
    orphaned = trial.start()
    time.sleep(dice.uniform(0.3, 0.8) * seconds)
    orphaned.send(signal.SIGKILL)
    orphaned.wait(5)
    outcome.injected += orphaned.alive()
    while orphaned.alive():
        outcome.starts += 1
        second = trial.start()
        code = second.wait(START_SECONDS)
        if code == 0:
            break
        text = (trial.folder / "log").read_text()
        if "is being trained by process" not in text:
            outcome.wrong.append(f"the second job ended with {code}: {text[-400:]}")
            break
    trial.finish(outcome)
    trial.compare(whole, outcome)
    return outcome


def signals(trial: Trial, whole: Trial, number: signal.Signals, moment: Moment) -> Outcome:
    """A signal to all ranks at some moment: everything is saved, the code says so, the next start goes on."""
    outcome = Outcome(number.name, trial.layout, starts=1)
    job = trial.start()
    moment(trial, job)
    job.send_all(number)
    code = job.wait(START_SECONDS)
    if code == STOPPED:
        outcome.injected += 1
        trial.check_status("stopped", STOPPED, outcome)
        step = (read_status(trial.run_dir) or {})["step"]
        saved = complete_steps(trial.run_dir / "checkpoints")
        if step and (not saved or saved[-1] != step):
            outcome.wrong.append(f"stopped after step {step}, but the newest checkpoint is of {saved[-1:]}")
    elif code not in (0, -number):  # finished, or hit before the handlers stood
        outcome.wrong.append(f"exit code {code} after {number.name}")
    trial.finish(outcome)
    trial.compare(whole, outcome)
    return outcome


def damage(trial: Trial, whole: Trial, kind: str, how: str, dice: random.Random) -> Outcome:
    """A file of the newest checkpoint is changed: the one before is taken, and the run ends as if nothing had been."""
    outcome = Outcome(f"{how} in {kind}", trial.layout, injected=1, starts=1)
    if trial.start("train.stop_at_step=6").wait(START_SECONDS) != 0:
        outcome.wrong.append("the first part failed")
    newest = max((trial.run_dir / "checkpoints").glob("step_*"))
    file = dice.choice(sorted(path for path in newest.rglob("*") if path.is_file() and kind in path.name))
    content = bytearray(file.read_bytes())
    if how == "flipped bit":
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    else:
        del content[dice.randrange(len(content)) :]
    file.write_bytes(content)
    trial.finish(outcome)
    log = (trial.folder / "log").read_text()
    if "an older checkpoint is tried" not in log and "MARKER" not in kind:
        outcome.wrong.append(f"nobody said so: {log[-400:]}")
    trial.compare(whole, outcome)
    return outcome


def planted(trial: Trial, whole: Trial, fault: str, dice: random.Random) -> Outcome:
    """A number that is not finite, a full disk or a hang, in one rank at a random step."""
    step, rank = dice.randrange(4, STEPS - 5), dice.randrange(RANKS)
    if fault in ("loss", "weight"):
        rank = 0  # of two tensor ranks the second may hold nothing but padding of this small vocabulary
    outcome = Outcome({"disk": "full disk", "hang": "hung rank"}.get(fault, f"{fault} not finite"), trial.layout, 1, 1)
    code = trial.start(fault=fault, rank=rank, argument=2 if fault == "disk" else step).wait(START_SECONDS)
    log = (trial.folder / "log").read_text()
    if fault == "hang":
        if code != HUNG or not list((trial.run_dir / "hangs").glob("*.txt")):
            outcome.wrong.append(f"exit code {code}, stacks {list(trial.run_dir.glob('hangs/*'))}")
        trial.finish(outcome)
    elif code != 0:
        outcome.wrong.append(f"exit code {code}: {log[-600:]}")
    if fault in ("disk", "hang"):
        trial.compare(whole, outcome)
        return outcome
    left_out = log.count("is left out")
    if fault == "weight":  # four steps are left out, then the run goes back and past their data
        path = trial.run_dir / "journal.jsonl"
        journal = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if len(journal) != 1 or journal[0]["until_data_step"] - journal[0]["from_data_step"] != 4:
            outcome.wrong.append(f"journal {journal}")
    elif left_out != 1:
        outcome.wrong.append(f"{left_out} steps were left out")
    if [line[0] for line in numbers_of(trial.run_dir, "loss")] != list(range(1, STEPS + 1)):
        outcome.wrong.append("steps are missing")
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors_of(trial.run_dir, STEPS).values())
    if not finite:
        outcome.wrong.append("weights are not finite")
    trial.check_status("finished", 0, outcome)
    return outcome
