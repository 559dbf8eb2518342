"""How far a count may lie from its expectation by chance: Bernstein's inequality, which holds for every n and p."""

import math

ERROR = 1e-9
"""Chance that one count of a right generator lies outside; the seeds are fixed, so a test that passes always passes."""


def deviation(trials: int, probability: float, error: float = ERROR) -> float:
    """What |X - n p| exceeds with chance at most `error`, for a sum X of n independent indicators of mean p."""
    log = math.log(2 / error)
    return log / 3 + math.sqrt(log**2 / 9 + 2 * trials * probability * (1 - probability) * log)


def within(count: int, trials: int, probability: float) -> bool:
    """Whether `count` of `trials` is what chance allows."""
    return abs(count - trials * probability) <= deviation(trials, probability)
