"""What is measured in which order: first what targets need, then everything else, so that a run cut short is useful.

A job is one comparison, timed in turn. B * T stays constant from length to length, so a length's time over its tokens
says what a token costs there; jobs of `batch_1` keep the batch instead and let the work grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

from dla_kernels.bench.layers import Arm, core_arms, variant_arms

LENGTH_ORDER = (16384, 65536, 4096, 131072, 8192, 32768, 2048)
"""Lengths by what targets ask of them."""
BATCH_1_FROM = 8192
"""Shortest length of the comparison at constant batch."""


@dataclass(frozen=True)
class Job:
    """One comparison."""

    kind: str
    """`layers`, `batch_1`, `parts` or `decode`."""
    shape: str
    """Name in SHAPES."""
    length: int = 0
    """T; the longest one of `batch_1`."""
    regime: str = "dense"
    """Boundaries: `dense` at tau 0.6 (3 of 4 tokens), `sparse` at the tau that leaves 1 of 10."""
    arms: tuple[Arm, ...] = ()

    def __str__(self) -> str:
        length = f" T {self.length}" if self.length else ""
        arms = f", {len(self.arms)} arms" if self.arms else ""
        return f"{self.kind} {self.shape}{length}, {self.regime}{arms}"

    @property
    def cost_key(self) -> tuple[str, str, int]:
        """Jobs of one key take about the same time."""
        return self.kind, self.shape, len(self.arms)


def schedule(shapes: list[str], lengths: list[int], patterns: list[str]) -> list[Job]:
    """All jobs on `shapes` (the last one is measured in variants alone where there are more than two) at `lengths`.

    patterns: fnmatch patterns of shape/arm; an arm that none fits is left out, and so is a job without arms. Decoding
    is the arm `decode`, the parts of a forward pass `parts`.
    """
    ordered = sorted(lengths, key=lambda t: (LENGTH_ORDER.index(t) if t in LENGTH_ORDER else len(LENGTH_ORDER), t))
    first, later = ordered[:1], ordered[1:]
    main, others = shapes[:2], shapes[2:]
    core, variants = tuple(core_arms()), tuple(variant_arms())
    dynamic = tuple(arm for arm in core if arm.family == "dla")
    jobs = [Job("layers", shape, length, arms=core) for length in first for shape in main]
    jobs += [Job("parts", shape, length, arms=dynamic[:1]) for length in first for shape in shapes]
    jobs += [Job("decode", shape) for shape in main]
    jobs += [Job("layers", shape, length, arms=core) for length in later for shape in main]
    jobs += [Job("batch_1", shape, max(lengths), arms=dynamic[:1]) for shape in main]
    jobs += [Job("layers", shape, length, "sparse", dynamic) for length in first for shape in main]
    jobs += [Job("layers", shape, length, arms=variants) for length in first for shape in main]
    jobs += [Job("layers", shape, length, arms=core[:-1] + variants) for length in first for shape in others]
    frozen = Arm("dla", dynamic[0].capacity, "frozen")
    jobs += [Job("parts", shape, length, arms=(frozen,)) for length in first for shape in shapes]
    jobs += [Job("layers", shape, length, "sparse", variants) for length in first for shape in main]
    for length in later:
        jobs += [Job("layers", shape, length, arms=variants) for shape in main]
        jobs += [Job("layers", shape, length, "sparse", dynamic + variants) for shape in main]
        jobs += [Job("layers", shape, length, arms=core[:-1] + variants) for shape in others]
    return [kept for job in jobs if (kept := _filtered(job, patterns)) is not None]


def _filtered(job: Job, patterns: list[str]) -> Job | None:
    def wanted(name: str) -> bool:
        return not patterns or any(fnmatch(f"{job.shape}/{name}", pattern) for pattern in patterns)

    if job.kind in ("decode", "parts"):
        return job if wanted(job.kind) else None
    arms = tuple(arm for arm in job.arms if wanted(arm.name))
    return Job(job.kind, job.shape, job.length, job.regime, arms) if arms else None
