"""Two gloo ranks: the sum is timed, and a rank that is wrong, slow or absent is named."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dla_train.config import Config
from dla_train.doctor import ranks as doctor_ranks
from dla_train.doctor.command import Options, examine
from dla_train.doctor.findings import FAILED, OK, WARNING, Finding, joined
from dla_train.doctor.ranks import RankFacts, judged
from tests.faults.processes import free_port, start

SMALL = Options(disk_mb=0, reduce_mb=1)


def examined(config: Config, out: Path, sabotage: Callable[[int], None]) -> list[dict[str, str]]:
    """The findings of two ranks, equal on both."""

    def job(rank: int) -> int:
        sabotage(rank)
        found = examine(config, SMALL)
        (out / f"{rank}.json").write_text(json.dumps([dataclasses.asdict(finding) for finding in found]))
        return 0

    code = start(job, 2, out / "log").wait(100)
    assert code == 0, (out / "log").read_text()[-3000:]
    first, second = (json.loads((out / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return list(first)


@pytest.fixture
def config(tiny: Callable[..., Config]) -> Config:
    return tiny("train.micro_batch_rows=4", "parallel.timeout_minutes=0.5")


def of_ranks(found: list[dict[str, str]]) -> list[dict[str, str]]:
    return [finding for finding in found if finding["check"] == "ranks"]


def test_two_sound_ranks_are_summed_over_and_timed(config: Config, tmp_path: Path) -> None:
    found = examined(config, tmp_path, lambda rank: None)
    assert FAILED not in {finding["state"] for finding in found}
    summed = of_ranks(found)[0]
    assert "2 rank(s) on 1 host(s): all-reduce of 1 MB in" in summed["what"] and "GB/s a rank" in summed["what"]


def wrong_sums(rank: int) -> None:
    if rank == 1:
        real = dist.all_reduce

        def broken(tensor: torch.Tensor, *more: Any, **named: Any) -> Any:
            done = real(tensor, *more, **named)
            if tensor.is_floating_point() and tensor.numel() > 9:
                tensor[7] += 1
            return done

        dist.all_reduce = broken


def test_a_rank_that_holds_wrong_sums_is_named(config: Config, tmp_path: Path) -> None:
    (finding,) = [f for f in of_ranks(examined(config, tmp_path, wrong_sums)) if f["state"] == FAILED]
    assert finding["what"].startswith("rank 1 (")
    assert "holds 1 wrong sums" in finding["what"]


def slow_product(rank: int) -> None:
    if rank == 0:
        real = doctor_ranks._product
        doctor_ranks._product = lambda device: (100 * real(device)[0], real(device)[1])


def test_a_slow_rank_is_named(config: Config, tmp_path: Path) -> None:
    slow = [f for f in of_ranks(examined(config, tmp_path, slow_product)) if "computes at" in f["what"]]
    assert [finding["what"].split(" (")[0] for finding in slow] == ["rank 0"] and slow[0]["state"] == WARNING


def test_ranks_that_nobody_joins_are_a_failure_after_their_timeout(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    for key, value in (alone | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(key, value)
    began = time.monotonic()
    found = examine(tiny("train.micro_batch_rows=4", "parallel.timeout_minutes=0.02"), SMALL)
    assert found[-1].state == FAILED and "the network between the hosts" in found[-1].what
    assert time.monotonic() - began < 60


FACTS = [RankFacts(f"rank {rank}", f"host{rank // 2}", "gpu", 1.0, "same", 0, 0.1, 0.1) for rank in range(4)]


def changed(rank: int, **values: Any) -> list[Finding]:
    facts = list(FACTS)
    facts[rank] = dataclasses.replace(facts[rank], **values)
    return judged(facts, 10**8)


def test_bandwidth_is_that_of_a_ring_and_of_the_slowest_rank() -> None:
    (finding,) = changed(2, reduce_seconds=0.15)
    assert finding.state == OK
    assert finding.what == "4 rank(s) on 2 host(s): all-reduce of 100 MB in 150.0 ms, 1.00 GB/s a rank"


def test_another_product_a_slow_link_and_wrong_sums_are_told_by_rank() -> None:
    (finding,) = changed(3, product="other")
    assert finding.state == FAILED and finding.what.startswith("rank 3 computes another product")
    (finding,) = changed(1, wrong_sums=5)
    assert finding.state == FAILED and finding.what.startswith("rank 1 holds 5 wrong sums")
    told = changed(1, send_seconds=0.5)  # to the other host, as rank 3's
    assert [finding.state for finding in told] == [OK, WARNING]
    assert told[1].what.startswith("rank 1 sends to rank 2 at 20%")
    assert all(finding.state == OK for finding in changed(1, send_seconds=0.15))


def test_links_between_hosts_are_compared_with_one_another() -> None:
    facts = [dataclasses.replace(rank, send_seconds=0.5 if index % 2 else 0.1) for index, rank in enumerate(FACTS)]
    assert [finding.state for finding in judged(facts, 10**8)] == [OK]


def test_findings_of_many_ranks_are_told_once_or_with_their_ranks() -> None:
    same, other = Finding("versions", OK, "torch 2.13"), Finding("versions", OK, "torch 2.6")
    data = Finding("data", OK, "3 shards")  # looked at once a machine
    names = [f"rank {rank}" for rank in range(6)]
    assert joined([[same, data], [same], [same, data]], names) == [same, data]
    told = joined([[same], [same, data], [other]], names)
    assert [(f.what, f.where) for f in told] == [
        ("torch 2.13", "rank 0, rank 1"),
        ("torch 2.6", "rank 2"),
        ("3 shards", ""),
    ]
    assert joined([[other]] * 5 + [[same]], names)[0].where == "rank 0, rank 1, rank 2, rank 3 and 1 more"
