"""What a check found, in one line; and how findings of many ranks become one list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OK, WARNING, FAILED = "ok", "warning", "FAILED"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    """Its name, one word."""
    state: str
    """`ok`, `warning` (the run works, but not as it might) or `FAILED` (it would not)."""
    what: str
    """What was found; after a failure what is wrong and how to mend it."""
    where: str = ""
    """The ranks that found it; "" for all, or where there is one."""

    def line(self) -> str:
        """For a terminal."""
        place = f"{self.where}: " if self.where else ""
        return f"{self.state:8} {self.check:10} {place}{self.what}"


def failed(findings: Sequence[Finding]) -> bool:
    """Whether any check failed."""
    return any(finding.state == FAILED for finding in findings)


def joined(by_rank: Sequence[Sequence[Finding]], names: Sequence[str]) -> list[Finding]:
    """One list of what the ranks called `names` found: equal findings once, others with the ranks that made them."""
    holders: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            holders.setdefault(finding, []).append(rank)
    ranks_of: dict[str, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for check in {finding.check for finding in findings}:
            ranks_of.setdefault(check, []).append(rank)
    found = []
    for finding, ranks in holders.items():
        where = "" if ranks == ranks_of[finding.check] else _named(ranks, names)
        found.append(Finding(finding.check, finding.state, finding.what, where))
    order = list(dict.fromkeys(finding.check for finding in found))
    return sorted(found, key=lambda finding: order.index(finding.check))


def _named(ranks: Sequence[int], names: Sequence[str]) -> str:
    shown = ", ".join(names[rank] for rank in ranks[:4])
    return shown + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
