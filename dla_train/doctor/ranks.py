"""The ranks together: whether sums come out right on every one, how fast, and which rank or link is slow.

A collective is as slow as its slowest member, so its time accuses nobody. Who is slow is found one by one: each rank
computes the same product alone, and each sends to the next while all others wait. The sums are of whole numbers
that float32 holds exactly, so there is one right answer; a rank that has another one, or another product, is named.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dla_train.doctor.findings import FAILED, OK, WARNING, Finding
from dla_train.parallel.mesh import Mesh

SLOW = 0.5
"""A rank or link of less than this share of the median's speed is named."""
REPEATS = 5
PRODUCT_SIZE = {"cpu": 512, "cuda": 4096}
"""Rows and columns of the matrices that every rank multiplies alone."""
LARGEST_SUMMAND = 1 << 12
"""Times 4,096 ranks is still exact in float32."""


@dataclass(frozen=True)
class RankFacts:
    """What one rank measured and is."""

    name: str
    """`rank 3 (host, cuda:1)`."""
    host: str
    kind: str
    """Name of its device; only ranks of one kind are compared."""
    product_seconds: float
    product: str
    """Fingerprint of the product that all ranks compute."""
    wrong_sums: int
    """Elements of the all-reduce that are not what they must be."""
    reduce_seconds: float
    """Of one all-reduce, the fastest."""
    send_seconds: float
    """To the next rank; 0 with one rank."""


def check_ranks(mesh: Mesh, size_bytes: int) -> list[Finding]:
    """An all-reduce of `size_bytes` over all ranks, each rank's own speed, and each link's. Collective."""
    elements = max(size_bytes // 4, 1)
    wrong, reduce_seconds = _all_reduce(mesh, elements)
    product_seconds, product = _product(mesh.device)
    facts = RankFacts(
        name=rank_name(mesh),
        host=platform.node(),
        kind=torch.cuda.get_device_name() if mesh.device.type == "cuda" else f"cpu {platform.machine()}",
        product_seconds=product_seconds,
        product=product,
        wrong_sums=wrong,
        reduce_seconds=reduce_seconds,
        send_seconds=_send_seconds(mesh, elements),
    )
    return judged(mesh.gather(facts), elements * 4)


def rank_name(mesh: Mesh) -> str:
    """What this rank is called in findings."""
    return f"rank {mesh.rank} ({platform.node()}, {mesh.device})"


def judged(ranks: Sequence[RankFacts], size_bytes: int) -> list[Finding]:
    """What the ranks' facts say; the all-reduce moved `size_bytes`."""
    count = len(ranks)
    wrong = [f"{rank.name} holds {rank.wrong_sums:,} wrong sums of an all-reduce" for rank in ranks if rank.wrong_sums]
    for kind in sorted({rank.kind for rank in ranks}):
        alike = [rank for rank in ranks if rank.kind == kind]
        usual = statistics.mode(rank.product for rank in alike)
        wrong += [f"{rank.name} computes another product than other ranks" for rank in alike if rank.product != usual]
    mend = "take its machine out of the job (SLURM: --exclude) and look at its memory, device and network"
    found = [Finding("ranks", FAILED, f"{problem}; {mend}") for problem in wrong]
    slow = _slow(ranks, lambda rank: rank.product_seconds, lambda rank: rank.kind)
    found += [Finding("ranks", WARNING, f"{name} computes at {share:.0%} of the others' speed") for name, share in slow]
    if count > 1:
        after = {rank.name: ranks[(index + 1) % count] for index, rank in enumerate(ranks)}
        slow = _slow(ranks, lambda rank: rank.send_seconds, lambda rank: str(rank.host == after[rank.name].host))
        found += [
            Finding("ranks", WARNING, f"{name} sends to {after[name].name} at {share:.0%} of other links' speed")
            for name, share in slow
        ]
    if wrong:
        return found
    seconds = max(rank.reduce_seconds for rank in ranks)
    bus = 2 * (count - 1) / count * size_bytes / seconds
    hosts = len({rank.host for rank in ranks})
    speed = f"all-reduce of {size_bytes / 1e6:,.0f} MB in {1e3 * seconds:,.1f} ms, {bus / 1e9:,.2f} GB/s a rank"
    summed = Finding("ranks", OK, f"{count} rank(s) on {hosts} host(s): {speed if count > 1 else 'nothing to sum'}")
    return [summed, *found]


def _slow(
    ranks: Sequence[RankFacts], seconds: Callable[[RankFacts], float], group: Callable[[RankFacts], str]
) -> list[tuple[str, float]]:
    """(name, share of the median's speed) of the slow ones in each group."""
    found = []
    for name in sorted({group(rank) for rank in ranks}):
        alike = [rank for rank in ranks if group(rank) == name]
        usual = statistics.median_low([seconds(rank) for rank in alike])
        found += [(rank.name, usual / seconds(rank)) for rank in alike if seconds(rank) * SLOW > usual]
    return found


def _all_reduce(mesh: Mesh, elements: int) -> tuple[int, float]:
    """(wrong elements, seconds of the fastest)."""
    pattern = torch.arange(elements, device=mesh.device) % LARGEST_SUMMAND
    expected = sum(((pattern + rank) % LARGEST_SUMMAND for rank in range(mesh.size)), torch.zeros_like(pattern))
    own = ((pattern + mesh.rank) % LARGEST_SUMMAND).float()
    wrong, fastest = 0, float("inf")
    for _ in range(REPEATS + 1):  # the first connects, and is the fastest of nothing
        summed = own.clone()
        mesh.barrier()
        began = _now(mesh.device)
        if mesh.size > 1:
            dist.all_reduce(summed)
        fastest = min(fastest, _now(mesh.device) - began)
        wrong = max(wrong, int((summed != expected).sum()))
    return wrong, max(fastest, 1e-9)


def _product(device: torch.device) -> tuple[float, str]:
    """(seconds, fingerprint) of a product of the same two matrices on every rank."""
    size = PRODUCT_SIZE[device.type]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    fastest, product = float("inf"), left
    for _ in range(REPEATS + 1):
        began = _now(device)
        product = left @ right
        fastest = min(fastest, _now(device) - began)
    return fastest, f"{float(product.double().sum()):.9e} {float(product.double().abs().sum()):.9e}"


def _send_seconds(mesh: Mesh, elements: int) -> float:
    """Of one message of `elements` to the next rank; every rank sends in its turn, while all others wait."""
    if mesh.size == 1:
        return 0.0
    message: Tensor = torch.zeros(elements, device=mesh.device)
    own = 0.0
    for sender in range(mesh.size):
        receiver = (sender + 1) % mesh.size
        fastest = float("inf")
        for _ in range(2):  # the first connects
            mesh.barrier()
            began = _now(mesh.device)
            if mesh.rank == sender:
                dist.send(message, receiver)
            elif mesh.rank == receiver:
                dist.recv(message, sender)
            mesh.barrier()  # gloo's send returns before the message is there
            fastest = min(fastest, _now(mesh.device) - began)
        if mesh.rank == sender:
            own = fastest
    return own


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
