"""Who can hold needles apart, without any training: the operations alone on random vectors.

Rows are those of the paired-token task: N needles in filler that repeats itself. Every key and value id is a random
unit vector; decay is 0 and Gated DeltaNet writes with strength 1. The last tokens go on with the filler and ask with a
needle's key; the answer is the value that lies nearest to what is read. Content weights alone do the reading (slot
weight 0, gain 1, a null slot), with a sharpness that a trained layer would have had to find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_kernels import content_read_weights, dla_attention, plan_memory, slot_affinity
from dla_kernels.markdown import markdown_table
from dla_kernels.memory.merging import CAPACITY_RULES
from dla_train.recall.tasks.paired_token import PairedToken
from dla_train.recall.tasks.streams import stream

TOKENS, KEY_DIM, VALUE_DIM, CAPACITY, TAU = 256, 16, 32, 30, 0.6
SHARPNESS = 30.0
NEEDLES = (4, 8, 16, 24, 32, 64)
NOISE = 0.05
"""Length of the random vector added to every token's key and value: repetition in life is not exact."""


@dataclass(frozen=True)
class ProbeArm:
    """A memory of the probe."""

    name: str
    policy: str
    drift: str = "token"
    capacity_rule: str = "density"

    @property
    def by_content(self) -> bool:
        """Whether its slots are weighted by content; a single state has nothing to choose from."""
        return self.policy != "single"


ARMS = (
    ProbeArm("single", "single"),
    ProbeArm("log_linear", "log_linear"),
    ProbeArm("fixed", "fixed"),
    ProbeArm("dla", "dla"),
    ProbeArm("dla, capacity_rule: mass", "dla", capacity_rule="mass"),
    ProbeArm("dla, drift: update", "dla", "update"),
)


@dataclass(frozen=True)
class ProbeRows:
    """Rows as vectors: q, k [B, T, 1, K], v [B, T, 1, V], float32; what is asked, and the values to choose from."""

    q: Tensor
    k: Tensor
    v: Tensor
    targets: Tensor
    """[B, N] int64: ids of the values asked for by the last N tokens."""
    values: Tensor
    """[ids, V]."""


def probe_rows(needles: int, rows: int, seed: int) -> ProbeRows:
    """Rows of `needles` needles, all of them asked."""
    task = PairedToken(needles=needles, tokens=TOKENS, queries=needles)
    generator = stream(seed, "held_out")
    batch = task.batch(rows, generator)
    keys, values = (
        F.normalize(torch.randn(size, dim, generator=generator), dim=-1)
        for size, dim in zip(task.vocabulary, (KEY_DIM, VALUE_DIM), strict=True)
    )
    context = TOKENS - needles
    key_ids, value_ids = batch.inputs.unbind(-1)
    asked = key_ids[:, context:].clone()
    key_ids[:, context:] = task.keys  # the first type of filler
    value_ids[:, context:] = task.values
    k, v = (
        F.normalize(table[ids] + NOISE * F.normalize(torch.randn(*ids.shape, dim, generator=generator), dim=-1), dim=-1)
        for table, ids, dim in ((keys, key_ids, KEY_DIM), (values, value_ids, VALUE_DIM))
    )
    q = k.clone()
    q[:, context:] = keys[asked]
    return ProbeRows(q[:, :, None], k[:, :, None], v[:, :, None], batch.targets[:, context:], values[: task.values])


@torch.no_grad()
def probe(arm: ProbeArm, backbone: str, rows: ProbeRows) -> float:
    """Share of right answers of one memory on one backbone, `mamba2` or `gated_deltanet`."""
    batch, tokens, _, _ = rows.k.shape
    decay = torch.zeros(batch, tokens, 1)
    beta = torch.ones(batch, tokens, 1) if backbone == "gated_deltanet" else None
    capacity = 1 if arm.policy == "single" else CAPACITY
    plan = plan_memory(
        rows.k,
        rows.v,
        decay,
        beta,
        tau=TAU,
        capacity=capacity,
        policy=arm.policy,
        drift=arm.drift,
        capacity_rule=arm.capacity_rule,
        interval=-(-tokens // capacity),
    )
    weights = torch.ones(batch, tokens, 1, capacity)
    if arm.by_content:
        affinity = slot_affinity(rows.q, rows.k, plan)
        weights = content_read_weights(0 * weights, affinity, gain=torch.ones(1), sharpness=torch.full((1,), SHARPNESS))
    read = dla_attention(rows.q, rows.k, rows.v, decay, beta, read_weights=weights, plan=plan)
    assert isinstance(read, Tensor)
    answers = (read[:, -rows.targets.shape[1] :, 0] @ rows.values.T).argmax(-1)
    return float((answers == rows.targets).float().mean())


def probe_table(needles: Sequence[int] = NEEDLES, rows: int = 32, seed: int = 0) -> str:
    """Every arm's right answers in %, in Markdown."""
    made = [probe_rows(n, rows, seed) for n in needles]
    answered = [
        [backbone, arm.name, *(f"{100 * probe(arm, backbone, one):.1f}" for one in made)]
        for backbone in ("mamba2", "gated_deltanet")
        for arm in ARMS
    ]
    return (
        f"Right answers in %, {rows} rows of {TOKENS} tokens, K = {KEY_DIM}, V = {VALUE_DIM}, {CAPACITY} slots.\n\n"
        f"{markdown_table(['backbone', 'memory', *(f'N = {n}' for n in needles)], answered)}"
    )


def merge_table(tokens: Sequence[int] = (256, 1024), rows: int = 8, seed: int = 0) -> str:
    """How evenly each rule fills a memory with tokens that have nothing in common, in Markdown."""
    longest = [[rule, *(f"{_longest(rule, count, rows, seed):.0f}" for count in tokens)] for rule in CAPACITY_RULES]
    return (
        f"Tokens in the longest of {CAPACITY} slots after unrelated tokens, mean of {rows} rows.\n\n"
        f"{markdown_table(['capacity_rule', *(f'{count} tokens' for count in tokens)], longest)}"
    )


@torch.no_grad()
def _longest(rule: str, count: int, rows: int, seed: int) -> float:
    """Tokens in the longest slot after `count` unrelated ones, mean of `rows` rows."""
    generator = stream(seed, "held_out")
    k = F.normalize(torch.randn(rows, count, 1, KEY_DIM, generator=generator), dim=-1)
    v = torch.randn(rows, count, 1, VALUE_DIM, generator=generator)
    decay = torch.zeros(rows, count, 1)
    plan = plan_memory(k, v, decay, tau=TAU, capacity=CAPACITY, capacity_rule=rule)
    starts = plan.slot_starts()[:, -1, 0]
    ends = torch.cat([starts[:, 1:], torch.full((rows, 1), count)], dim=1)
    return float((ends - starts).amax(1).float().mean())
