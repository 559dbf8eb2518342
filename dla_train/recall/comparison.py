"""What the runs of a study say: means over seeds with intervals, paired differences, and which arms count.

An interval is Student's t over seeds, of the mean of an arm or of the difference from the baseline seed by seed. An arm
that has not learnt the easy part with every seed was not trained long enough to be compared: it is void and has no
difference from the baseline, nor has any arm from a void baseline. Its own numbers stay in the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dla_train.intervals import Interval, interval
from dla_train.recall.arms import ATTENTION, Arm
from dla_train.recall.runs import StudyRuns
from dla_train.recall.settings import StudyConfig
from dla_train.recall.training import RunResult


@dataclass(frozen=True)
class PartNumbers:
    """One arm on one part."""

    accuracy: Interval
    difference: Interval | None
    """From the baseline of its backbone, seed by seed; None of the baseline, of attention, and where either is void."""
    clear: bool | None
    """Whether the two arms' own intervals do not meet, in the arm's favour."""
    steps_to_goal: list[int | None]
    """By seed, in the order of the settings."""


@dataclass(frozen=True)
class ArmNumbers:
    """One arm of a study."""

    arm: Arm
    learning_rate: float
    void: str | None
    """Why the arm cannot be compared; None if it can."""
    parts: dict[str, PartNumbers]
    soft_cost: float | None
    """Loss with inference's boundaries over loss with training's, less 1, over all parts and seeds."""
    boundary_rate: float | None
    live_slots: float | None
    seconds: float
    """Mean wall time of a run."""


def compare_arms(study: StudyConfig, runs: StudyRuns) -> list[ArmNumbers]:
    """The numbers of every arm that has a finished run, in the order of the settings."""
    found = []
    for arm in runs.arms:
        own = runs.results[arm.name]
        if not own:
            continue
        baseline = baseline_of(study, runs, arm)
        compared = baseline if baseline and not _void(study, own) and not _void(study, baseline) else None
        parts = {part: _part(study, own, compared, part) for part in next(iter(own.values())).parts}
        found.append(
            ArmNumbers(
                arm,
                runs.rates[arm.name],
                _void(study, own),
                parts,
                _soft_cost(own),
                _mean([result.boundary_rate for result in own.values()]),
                _mean([result.live_slots for result in own.values()]),
                float(np.mean([result.seconds for result in own.values()])),
            )
        )
    return found


def baseline_of(study: StudyConfig, runs: StudyRuns, arm: Arm) -> Mapping[int, RunResult] | None:
    """Runs that the arm's are compared with, by seed; None for a baseline and for attention."""
    if arm.name == ATTENTION or arm.memory == study.baseline:
        return None
    return runs.results.get(f"{arm.backbone}_{study.baseline}")


def _part(
    study: StudyConfig, own: Mapping[int, RunResult], baseline: Mapping[int, RunResult] | None, part: str
) -> PartNumbers:
    accuracy = interval([result.parts[part].accuracy for result in own.values()])
    steps = [own[seed].steps_to(part, study.goal_accuracy) if seed in own else None for seed in study.seeds]
    shared = [seed for seed in own if baseline and seed in baseline]
    if baseline is None or not shared:
        return PartNumbers(accuracy, None, None, steps)
    differences = [own[seed].parts[part].accuracy - baseline[seed].parts[part].accuracy for seed in shared]
    other = interval([result.parts[part].accuracy for result in baseline.values()])
    return PartNumbers(accuracy, interval(differences), accuracy.clear_of(other), steps)


def _void(study: StudyConfig, own: Mapping[int, RunResult]) -> str | None:
    absent = [seed for seed in study.seeds if seed not in own]
    if absent:
        return f"seeds {absent} failed"
    if study.easy is None:
        return None
    below = [seed for seed, result in own.items() if result.parts[study.easy].accuracy < study.easy_accuracy]
    if not below:
        return None
    worst = min(own[seed].parts[study.easy].accuracy for seed in below)
    return f"{study.easy} at {100 * worst:.1f}% (seeds {below}), below {100 * study.easy_accuracy:g}%"


def _soft_cost(own: Mapping[int, RunResult]) -> float | None:
    judged = [judgement for result in own.values() for judgement in result.parts.values()]
    soft = [judgement.soft_loss for judgement in judged if judgement.soft_loss is not None]
    return sum(judgement.loss for judgement in judged) / sum(soft) - 1 if soft else None


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None
