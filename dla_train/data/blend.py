"""Which source each row of the run comes from: weights in phases, dealt with bounded error, found by arithmetic.

Rows are dealt to sources by a tree of two-way splits. At a node, of the first n rows round(n * share) go left: a count
that grows by 0 or 1 with n and is known for any n at once. So after any number of rows of a phase a source is within
ceil(log2 sources) / 2 of its weight's share, no row is counted one by one, and weights are exact fractions, free of
rounding. The ledger of a step (how far every source has been read) is a sum over phases. Which place of a step's
global batch a source takes is shuffled in loader.py; a source hands out its rows in its own order.

A run that goes on with data changed on purpose counts from a `Start`: the past is then what was read, not what the
phases say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction


@dataclass(frozen=True)
class Phase:
    """From `start_step` on: the weights of the sources (above 0, any sum) and the tokens of a row."""

    start_step: int
    weights: Mapping[str, Fraction]
    context_tokens: int


@dataclass(frozen=True)
class Start:
    """Where counting begins: the rows of every source that were read before `step`."""

    step: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)


class Dealer:
    """Deals rows 0, 1, 2, ... to the sources of `weights`."""

    def __init__(self, weights: Mapping[str, Fraction]) -> None:
        self._tree = _tree(sorted((name, weight) for name, weight in weights.items() if weight > 0))

    def counts(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows each source gets."""
        found: dict[str, int] = {}
        _deal(self._tree, rows, found)
        return found


_Tree = str | tuple[Fraction, "_Tree", "_Tree"]  # a source, or (the left share, left, right)


def _tree(sources: Sequence[tuple[str, Fraction]]) -> _Tree:
    if len(sources) == 1:
        return sources[0][0]
    left, right = sources[: len(sources) // 2], sources[len(sources) // 2 :]
    share = sum(weight for _, weight in left) / Fraction(sum(weight for _, weight in sources))
    return share, _tree(left), _tree(right)


def _deal(tree: _Tree, rows: int, found: dict[str, int]) -> None:
    if isinstance(tree, str):
        found[tree] = rows
        return
    share, left, right = tree
    first = (2 * rows * share.numerator + share.denominator) // (2 * share.denominator)  # round half up
    _deal(left, first, found)
    _deal(right, rows - first, found)


class Blend:
    """The phases of a run, in order of their start, the first at step 0; a step deals `rows_per_step` rows."""

    def __init__(self, phases: Sequence[Phase], rows_per_step: int, start: Start | None = None) -> None:
        self.phases = list(phases)
        self.rows_per_step = rows_per_step
        self.start = start or Start()
        self.names = sorted({name for phase in phases for name, weight in phase.weights.items() if weight > 0})
        """Sources with rows in any phase."""
        self._dealers = [Dealer(phase.weights) for phase in phases]

    def phase(self, step: int) -> Phase:
        """The phase that `step` (0-based) lies in."""
        return [phase for phase in self.phases if phase.start_step <= step][-1]

    def ledger(self, step: int) -> dict[str, int]:
        """Rows of each source in the steps before `step`, which must not lie before the start."""
        if step < self.start.step:
            raise ValueError(f"step={step} lies before step {self.start.step}, where this run's data begins")
        rows = {**dict.fromkeys(self.names, 0), **self.start.rows}
        for index, phase in enumerate(self.phases):
            begin, end = max(phase.start_step, self.start.step), min(self._end(index, step), step)
            if end <= begin:
                continue
            dealt = self._dealers[index].counts((end - phase.start_step) * self.rows_per_step)
            before = self._dealers[index].counts((begin - phase.start_step) * self.rows_per_step)
            for name, count in dealt.items():
                rows[name] += count - before[name]
        return rows

    def timeline(self, step: int) -> list[dict[str, object]]:
        """What decided the steps before `step`, as plain values: equal if and only if the dealing was."""
        return [
            {
                "start_step": phase.start_step,
                "context_tokens": phase.context_tokens,
                "weights": _normalised(phase.weights),
            }
            for phase in self.phases
            if phase.start_step < step
        ]

    def _end(self, index: int, last: int) -> int:
        return self.phases[index + 1].start_step if index + 1 < len(self.phases) else last


def _normalised(weights: Mapping[str, Fraction]) -> dict[str, str]:
    total = sum(weights.values())
    return {name: str(weights[name] / total) for name in sorted(weights) if weights[name] > 0}
