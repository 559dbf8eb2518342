"""The loop of a sweep: start points while there is room, see how they end, tell the search, until nothing is left.

Every decision can be made again from the points' folders: a finished run is known by its status, a run that a killed
sweep left behind is found and waited for, one that was stopped goes on from its checkpoint, and one that failed stays
failed with its reason. So a sweep that was killed at any moment goes on by the same command, and runs each point once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from dla_train.config import Config, ConfigError
from dla_train.sweep.definition import SweepConfig
from dla_train.sweep.launchers import Job, Launcher
from dla_train.sweep.outcomes import (
    Outcome,
    ending,
    failed_outcome,
    finished_outcome,
    read_outcome,
    status_stamp,
    steps_done,
    write_outcome,
)
from dla_train.sweep.points import Point, Setting, check_points, points_of, run_words, write_point
from dla_train.sweep.tpe import Study
from dla_train.trackers import METRICS_FILE, read_lines

LOOK_SECONDS = 0.1
"""How often processes are looked at; a signal is heard at once."""
PRUNE_SECONDS = 2.0
"""How often the validations of running points are read."""


@dataclass
class _Active:
    """A point whose run is at work."""

    point: Point
    job: Job
    status_before: int | None
    began: float
    asked: bool = False
    """Whether it was asked to stop."""
    pruned: bool = False

    def ask_to_stop(self) -> None:
        """Once: torchrun would be interrupted in its shutdown by a second request."""
        if not self.asked:
            self.asked = True
            self.job.stop()


@dataclass
class SweepRun:
    """One start of a sweep."""

    sweep: SweepConfig
    overrides: Sequence[str]
    launcher: Launcher
    study: Study | None
    """The search, where the sampler is one."""
    _queue: deque[Point] = field(default_factory=deque)
    _active: list[_Active] = field(default_factory=list)
    _points: list[Point] = field(default_factory=list)
    _starts: dict[str, int] = field(default_factory=dict)
    _stopped_points: set[str] = field(default_factory=set)
    _signals: int = 0
    _wake: threading.Event = field(default_factory=threading.Event)
    _looked: float = 0.0
    busy_seconds: float = 0.0
    """Time that points were at work, added up over the points."""

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return Path(self.sweep.folder)

    def run(self, points: Sequence[Point], configs: dict[str, Config]) -> bool:
        """Run `points`, and what the search asks for. Returns whether it came to the end: not if it was stopped.

        SIGTERM, SIGINT and SIGUSR1 stop every point after its step, saved; a second one leaves them to it.
        """
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            self._add(points, configs)
            for setting in self.study.settings() if self.study else ():
                self._take_up(setting)
            while self._turn():
                self._wake.wait(LOOK_SECONDS)
                if self._signals < 2:
                    self._wake.clear()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return not self._signals and not self._stopped_points

    def _turn(self) -> bool:
        """Look at everything once; whether there is more to do."""
        self._collect()
        if self._signals:
            for active in self._active:
                active.ask_to_stop()
            return bool(self._active) and self._signals < 2
        self._prune()
        self._fill()
        return bool(self._active or self._queue)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            again = "; once more leaves them to it" if self._active else ""
            self._say(f"{signal.Signals(number).name}: {len(self._active)} points stop and are saved{again}")
        self._wake.set()

    def _add(self, points: Iterable[Point], configs: dict[str, Config]) -> None:
        """Take up points: those that have ended stay, those at work are waited for, the others queue."""
        for point in points:
            write_point(self.folder, point, configs[point.name])
            self._points.append(point)
            run_dir = point.folder(self.folder)
            if read_outcome(run_dir):
                continue
            if job := self.launcher.adopt(run_dir):
                self._say(f"{point.name} is still running")
                self._active.append(_Active(point, job, None, time.monotonic()))
            elif ending(run_dir, None, None) == "finished":
                self._end(point, finished_outcome(run_dir, self.sweep.objective))
            else:
                self._queue.append(point)
        self._tell(points)

    def _fill(self) -> None:
        """Start queued points, then new proposals, while there is room."""
        while self.launcher.free() > 0:
            if not self._queue and not self._propose():
                return
            if self._queue:
                self._start(self._queue.popleft())

    def _propose(self) -> bool:
        """Take up the next proposal; False if there is none."""
        setting = self.study.ask() if self.study else None
        if setting is not None:
            self._take_up(setting)
        return setting is not None

    def _take_up(self, setting: Setting) -> None:
        """Add the points of a proposal; one that breaks a rule between settings has failed."""
        assert self.study is not None and setting.trial is not None
        points = points_of(self.sweep, self.overrides, [setting])
        try:
            configs = check_points(self.sweep, points)
        except ConfigError as error:
            if self.study.is_open(setting.trial):
                self.study.tell(setting.trial, "failed")
                self._say(f"{setting.name} is passed over: {error}")
            return
        self._add(points, configs)

    def _start(self, point: Point) -> None:
        run_dir = point.folder(self.folder)
        stamp = status_stamp(run_dir)
        self._starts[point.name] = self._starts.get(point.name, 0) + 1
        job = self.launcher.start(run_dir, run_words(self.sweep, point))
        self._active.append(_Active(point, job, stamp, time.monotonic()))
        self._say(f"{point.name} {'goes on' if stamp else 'starts'}")

    def _collect(self) -> None:
        """Settle what has ended."""
        for active in [active for active in self._active if not active.job.running()]:
            self._active.remove(active)
            self.launcher.release(active.job)
            self.busy_seconds += time.monotonic() - active.began
            self._settle(active)

    def _settle(self, active: _Active) -> None:
        point, run_dir = active.point, active.point.folder(self.folder)
        code, starts = active.job.exit_code(), self._starts.get(active.point.name, 0)
        how = ending(run_dir, code, active.status_before)
        if how == "finished":
            self._end(point, finished_outcome(run_dir, self.sweep.objective), active)
        elif active.pruned:
            done = steps_done(run_dir)
            reason = f"above the median of the other settings at step {done}"
            self._end(point, Outcome("pruned", done, reason=reason), active)
        elif how == "failed" or (how == "died" and starts >= self.sweep.attempts and not self._signals):
            self._end(point, failed_outcome(run_dir, code, starts), active)
        elif how == "stopped":
            self._stopped_points.add(point.name)
            self._say(f"{point.name} stopped at step {steps_done(run_dir)}, saved")
        elif not self._signals:
            self._say(f"{point.name} ended at step {steps_done(run_dir)} with {code}; it is started again")
            self._queue.append(point)

    def _end(self, point: Point, outcome: Outcome, active: _Active | None = None) -> None:
        write_outcome(point.folder(self.folder), outcome)
        value = f": {self.sweep.objective} {outcome.value:.4f}" if outcome.value is not None else ""
        took = f" ({time.monotonic() - active.began:.0f} s)" if active else ""
        why = f": {outcome.reason}" if outcome.reason else ""
        self._say(f"{point.name} {outcome.state}{value}{why}{took}")
        self._tell([point])

    def _tell(self, points: Iterable[Point]) -> None:
        """Tell the search of trials whose points have all ended."""
        if self.study is None:
            return
        for number in {point.trial for point in points if point.trial is not None}:
            group = [point for point in self._points if point.trial == number]
            outcomes = [read_outcome(point.folder(self.folder)) for point in group]
            ended = [outcome for outcome in outcomes if outcome is not None]
            if len(ended) < len(self.sweep.seeds) or not self.study.is_open(number):
                continue
            if self.sweep.prune:
                self.study.report(number, self._curve(group))  # what others are compared with
            values = [outcome.value for outcome in ended if outcome.value is not None]
            if len(values) == len(ended):
                self.study.tell(number, "finished", sum(values) / len(values))
            else:
                self.study.tell(number, "pruned" if any(o.state == "pruned" for o in ended) else "failed")

    def _prune(self) -> None:
        """Stop trials that lie behind, by the mean of their seeds."""
        if self.study is None or not self.sweep.prune or time.monotonic() < self._looked + PRUNE_SECONDS:
            return
        self._looked = time.monotonic()
        for number in {active.point.trial for active in self._active if active.point.trial is not None}:
            group = [point for point in self._points if point.trial == number]
            if not self.study.is_open(number):
                continue
            self.study.report(number, self._curve(group))
            if self.study.should_stop(number):
                for active in self._active:
                    if active.point.trial == number and not active.pruned:
                        active.pruned = True
                        active.ask_to_stop()
                for point in [point for point in self._queue if point.trial == number]:
                    self._queue.remove(point)
                    self._end(point, Outcome("pruned", 0, reason="its setting was pruned before this seed began"))

    def _curve(self, group: Sequence[Point]) -> dict[int, float]:
        """Mean objective over the seeds, at the validations that all of them have had."""
        curves = []
        for point in group:
            lines = read_lines(point.folder(self.folder) / METRICS_FILE)
            curves.append({line["step"]: line[self.sweep.objective] for line in lines if self.sweep.objective in line})
        common = sorted(set.intersection(*(set(curve) for curve in curves)))
        return {step: sum(curve[step] for curve in curves) / len(curves) for step in common}

    def _say(self, text: str) -> None:
        ended = sum(read_outcome(point.folder(self.folder)) is not None for point in self._points)
        expected = len(self._points)
        if self.study is not None:
            expected = (len(self.sweep.baselines) + self.sweep.budget) * len(self.sweep.seeds)
        print(f"[{ended}/{expected}] {text}", flush=True)
