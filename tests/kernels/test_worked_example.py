"""The worked example of docs/dla.md, section 12: every number of its table and states, by every path."""

import re
from pathlib import Path

import pytest
import torch

import dla_kernels as dk

DOCS = Path(__file__).parents[2] / "docs" / "dla.md"
SECTION = DOCS.read_text(encoding="utf-8").partition("## 12. A worked example")[2]
ROWS = [line.strip("| ").split(" | ") for line in SECTION.splitlines() if re.match(r"\| \d", line)]
TAU, CAPACITY, QUERY, WEIGHTS = 0.6, 3, (1.0, 2.0), (1.0, 0.5, 2.0)
READ = {"density": [18.0, 4.5], "mass": [18.0, 1.5]}


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def column(index: int) -> torch.Tensor:
    """Keys (1) or values (2) of the table, [1, 7, 1, 2]."""
    return torch.tensor([numbers(row[index]) for row in ROWS], dtype=torch.float64)[None, :, None]


K, V = column(1), column(2)
DECAY = torch.zeros(1, len(ROWS), 1, dtype=torch.float64)


def slots_of(text: str) -> list[int]:
    """First token of every slot of a cell, counted from 0."""
    return [int(numbers(slot)[0]) - 1 for slot in re.findall(r"\{[^}]*\}", text)]


def states_of(rule: str) -> torch.Tensor:
    """[slots, 2, 2], the oldest first."""
    line = next(line for line in SECTION.splitlines() if line.startswith(rule))
    return torch.tensor([numbers(part) for part in re.findall(r"\[([^]]*)\]", line)]).view(-1, 2, 2).double()


@pytest.mark.parametrize("backend", ["recurrent", "torch", "triton"])
@pytest.mark.parametrize("rule", ["density", "mass"])
def test_plan_states_and_reads_are_those_of_the_text(rule: str, backend: str) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    k, v, decay = (x.to(dtype) for x in (K, V, DECAY))
    plan = dk.plan_memory(k, v, decay, tau=TAU, capacity=CAPACITY, capacity_rule=rule, backend=backend)
    torch.testing.assert_close(plan.score.flatten().double(), column(3).flatten(), atol=5e-5, rtol=0)
    assert plan.boundary.flatten().tolist() == [row[4] == "yes" for row in ROWS]
    for t, row in enumerate(ROWS):
        there = plan.boundary[0, : t + 1, 0] & (plan.death[0, : t + 1, 0] > t)
        assert there.nonzero().flatten().tolist() == slots_of(row[5 if rule == "density" else 6])

    q = torch.tensor(QUERY, dtype=dtype).expand_as(k)
    for weights, wanted in ((WEIGHTS, READ[rule]), ((1.0, 1.0, 1.0), [9.0, 2.0])):
        read, cache = dk.dla_attention(
            *(q, k, v, decay),
            read_weights=torch.tensor(weights, dtype=dtype).expand(1, len(ROWS), 1, CAPACITY),
            plan=plan,
            scale=1.0,
            return_cache=True,
            backend=backend,
        )
        assert read[0, -1, 0].tolist() == pytest.approx(wanted)
    torch.testing.assert_close(cache.states[0, 0].double(), states_of(rule))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rule", ["density", "mass"])
def test_decoding_token_by_token_ends_there_too(rule: str, backend: str) -> None:
    cache = dk.MergeCache.empty(1, 1, CAPACITY, 2, 2)
    for t in range(len(ROWS)):
        read = dk.dla_step(
            *(torch.tensor(QUERY)[None, None], K[:, t].float(), V[:, t].float(), DECAY[:, t].float()),
            read_weights=torch.tensor(WEIGHTS)[None, None],
            tau=TAU,
            cache=cache,
            capacity_rule=rule,
            scale=1.0,
            backend=backend,
        )
    assert read.flatten().tolist() == pytest.approx(READ[rule])
    torch.testing.assert_close(cache.states[0, 0].double(), states_of(rule))
    for number in READ[rule]:
        assert f"{number:g}" in SECTION
