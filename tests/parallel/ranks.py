"""Running worker functions on several ranks (gloo on the CPU, NCCL on CUDA), all checks of a module in one start.

A worker module is importable from the repository's root and holds functions

    def losses(axes: Axes, backbone: str) -> dict[str, Tensor | float | str]: ...

which are called on every rank with the axes of the check's layout (groups included) and its arguments, and return
what the test compares, on the CPU. A test module names its checks and starts each number of ranks once:

    CHECKS = [Check("losses", tensor=2, sequence=True, arguments={"backbone": "mamba2"}), ...]

    @pytest.fixture(scope="module")
    def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
        checks = chosen(CHECKS, request)  # those whose tests are to run: with `-k` or `-m` not all
        return run_on_ranks("tests.parallel.model_worker", checks, 2, tmp_path_factory.mktemp("ranks"))

    def test_...(outcomes: Outcomes) -> None:
        by_rank = outcomes.of(CHECKS[0])  # [what rank 0 returned, what rank 1 returned]
        expected = model_worker.losses(Axes.single(), backbone="mamba2")  # one rank: call the function here

Checks run layout by layout, those of one in the order of the list and on the same groups. `of` fails with the rank, the
check and the traceback where a check raised; the launcher then ends every rank, so later checks did not run, and their
`of` says so. A layout with tensor = context = 1 leaves all ranks data-parallel and does not import megatron, which
takes 3 s of each rank.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.runs import run_python

Result = dict[str, Tensor | float | str]

device = torch.device("cpu")
"""Where the worker functions of this process compute; set by rank_worker."""


@dataclass(frozen=True)
class Check:
    """One call of a worker function on every rank; the data axis takes the ranks that tensor x context leaves."""

    function: str
    tensor: int = 1
    context: int = 1
    sequence: bool = False
    arguments: Mapping[str, str | int | float | bool] = field(default_factory=dict)


def chosen(checks: Sequence[Check], request: pytest.FixtureRequest) -> list[Check]:
    """Those of `checks` that are the parameter `check` of a test of this module that was not deselected."""
    items = [item for item in request.session.items if item.nodeid.split("::")[0] == request.node.nodeid]
    asked = [item.callspec.params.get("check") for item in items if hasattr(item, "callspec")]
    return [check for check in checks if check in asked]


def slow_but(fast: Sequence[Check], checks: Sequence[Check]) -> list[Any]:
    """`checks` as parameters of a test, each marked slow that is not among the `fast`."""
    return [check if check in fast else pytest.param(check, marks=pytest.mark.slow) for check in checks]


class Outcomes:
    """What the ranks of one start returned."""

    def __init__(self, folder: Path, checks: Sequence[Check], ranks: int, output: str) -> None:
        self._folder, self._checks, self._ranks, self._output = folder, list(checks), ranks, output

    def of(self, check: Check) -> list[Result]:
        """The results of a check by rank. Raises AssertionError where a rank did not finish it."""
        files = [self._folder / f"{self._checks.index(check)}.{rank}.pt" for rank in range(self._ranks)]
        missing = [rank for rank, file in enumerate(files) if not file.exists()]
        assert not missing, f"{check} was not finished on rank(s) {missing}: {self._failure()}"
        return [torch.load(file, weights_only=True) for file in files]

    def _failure(self) -> str:
        """What ranks wrote about their exceptions, the first one first, and the end of what the launcher said."""
        reports = []
        for file in sorted(self._folder.glob("*.failed"), key=lambda file: file.stat().st_mtime_ns):
            index, rank = file.name.split(".")[:2]
            reports.append(f"{self._checks[int(index)]} failed on rank {rank}:\n{file.read_text()}")
        return "\n".join([*reports, f"the launcher ended with\n{self._output[-2000:]}"])


def run_on_ranks(
    module: str, checks: Sequence[Check], ranks: int, folder: Path, timeout: float = 300, on: str = "cpu"
) -> Outcomes:
    """Run `checks` on `ranks` processes of one machine, one after the other; results and failures lie in `folder`.

    on: `cpu`, or `cuda` for a device a rank, where the worker functions support it.
    """
    spec = folder / "spec.json"
    spec.write_text(json.dumps([dataclasses.asdict(check) for check in checks]))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    worker = ["-m", "tests.parallel.rank_worker", module, str(spec), on]
    done = run_python([*launcher, *worker], timeout=timeout)
    return Outcomes(folder, checks, ranks, done.stdout + done.stderr)
