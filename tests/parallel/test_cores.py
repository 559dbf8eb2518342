"""Ranks compute near their GPUs, or on cores of their own; nothing that is not known binds them."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dla_train.config import ConfigError
from dla_train.parallel import cores
from dla_train.parallel.cores import as_ranges, bind_cores, choose_cores, gpu_node
from tests.train.runs import ROOT

ALL = frozenset(range(16))


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """Two sockets of four cores with two threads each: 0-3 and 8-11, 4-7 and 12-15."""
    for node, ranges in enumerate(("0-3,8-11", "4-7,12-15")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{ranges}\n")
    for core in range(16):
        folder = tmp_path / f"devices/system/cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 8},{core % 8 + 8}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("how", "place", "nodes", "allowed", "chosen"),
    [
        ("node", 0, [0, 1], ALL, "0-3,8-11"),
        ("node", 1, [0, 1], ALL, "4-7,12-15"),
        ("node", 1, [0, 1], frozenset({4, 5, 0}), "4-5"),  # what SLURM gave this job
        ("node", 1, [0, 1], frozenset({0, 1}), "0-1"),  # nothing near: what there is
        ("node", 1, [None, None], ALL, "0-15"),  # no GPU, or nobody knows where
        ("share", 0, [0, 1, 1, 1], ALL, "0-3,8-11"),
        ("share", 1, [0, 1, 1, 1], ALL, "4,12"),
        ("share", 2, [0, 1, 1, 1], ALL, "5,13"),
        ("share", 3, [0, 1, 1, 1], ALL, "6-7,14-15"),
        ("share", 1, [None, None], ALL, "4-7,12-15"),
        ("share", 1, [None] * 3, frozenset({0, 1}), "0-1"),  # fewer cores than ranks: none is left without
    ],
)
def test_a_rank_has_the_cores_of_its_gpus_node_or_a_share_of_whole_ones(
    system: Path, how: str, place: int, nodes: list[int | None], allowed: frozenset[int], chosen: str
) -> None:
    assert as_ranges(choose_cores(how, place, nodes, allowed, system)) == chosen


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_shares_are_disjoint_and_leave_no_core_out(system: Path, ranks: int) -> None:
    shares = [choose_cores("share", rank, [None] * ranks, ALL, system) for rank in range(ranks)]
    assert frozenset().union(*shares) == ALL and sum(map(len, shares)) == len(ALL)


def test_a_machine_that_tells_nothing_still_gives_shares(tmp_path: Path) -> None:
    assert [as_ranges(choose_cores("share", r, [None] * 2, frozenset(range(4)), tmp_path)) for r in (0, 1)] == [
        "0-1",
        "2-3",
    ]


@pytest.mark.parametrize(("written", "node"), [("1\n", 1), ("-1\n", None), (None, None)])
def test_the_node_of_a_gpu_is_what_the_kernel_says_of_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str | None, node: int | None
) -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xDC, pci_device_id=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    folder = tmp_path / "bus/pci/devices/0000:dc:03.0"
    folder.mkdir(parents=True)
    if written is not None:
        (folder / "numa_node").write_text(written)
    assert gpu_node(0, tmp_path) == node


def test_binding_reaches_threads_that_exist_and_is_done_once() -> None:
    """In a process of its own, whose cores are cut to one by LOCAL_RANK 1 of two on two cores."""
    program = (
        "import os, threading, time, torch\n"
        "from dla_train.parallel.cores import bind_cores\n"
        "go = threading.Event(); seen = []\n"
        "other = threading.Thread(target=lambda: (go.wait(), seen.append(os.sched_getaffinity(0))))\n"
        "other.start(); before = sorted(os.sched_getaffinity(0))\n"
        "bind_cores(torch.device('cpu')); bind_cores(torch.device('cpu')); go.set(); other.join()\n"
        "now = os.sched_getaffinity(0)\n"
        "assert seen == [now] and len(before) // 2 <= len(now) <= -(-len(before) // 2), now\n"
        "assert 'DLA_BIND' not in os.environ\n"
        "assert len(before) < 2 or before[0] not in now, (before, now)\n"
    )
    environment = {"DLA_BIND": "share", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | environment | paths, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_a_way_to_bind_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cores.VARIABLE, "socket")
    with pytest.raises(ConfigError, match="DLA_BIND=socket is not a way to bind ranks; choose from node, share, none"):
        bind_cores(torch.device("cpu"))
