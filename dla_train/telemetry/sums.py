"""What a look at a memory adds up for each head: sums, counts and histograms, and nothing that is not additive.

Additive, so that micro-batches, segments and ranks are joined by a sum, and means are taken once, at the end. Scores
and gates are taken of all tokens. What needs the list of live slots (their lengths, ages and read weights) is taken at
SAMPLED_TOKENS of each row: places that are a function of the row's length alone, at which no regular pattern of
boundaries is seen always at the same phase. No random numbers, no device synchronisation.

An age is counted in tokens since the slot opened; of a merge, since the older of its two slots did.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dla_kernels.memory.gates import soften
from dla_kernels.plan import NO_SLOT
from dla_train.models.mixer import MemoryReading

SAMPLED_TOKENS = 64
"""Tokens of each row at which the live slots are looked at."""
SCORE_BINS, SCORE_WIDTH = 40, 0.05
"""Bins of drift, over its range of 0 to 2."""
AGE_BINS = 20
"""Bins of ages and lengths by powers of two: bin b holds 2^b to 2^(b+1) - 1 tokens, the last one all above, too."""

WIDTHS: dict[str, int] = {
    "decisions": 1,  # tokens but a document's first: the others decide nothing
    "boundaries": 1,  # of the decisions
    "score": 1,  # sum over decisions
    "gates": 1,  # boundaries that carry a gate
    "gate_distance": 1,  # sum over them of the distance to 0 or 1, whichever is nearer
    "samples": 1,  # sampled tokens that decide
    "slots": 1,  # live at samples
    "slot_tokens": 1,  # tokens in them
    "merges": 1,  # by capacity, at samples
    "merge_age": 1,  # sum over them
    "entropy": 1,  # of the read weights' shares, nats, sum over samples
    "most_entropy": 1,  # what it would be with equal weights
    "open_share": 1,  # share of the open slot, sum over samples
    "score_histogram": SCORE_BINS,  # decisions
    "slot_tokens_histogram": AGE_BINS,  # slots live at samples, by their tokens
    "merge_age_histogram": AGE_BINS,  # merges
    "read_share_by_age": AGE_BINS,  # share of the read weights, sum over samples
}
"""Columns of a head's sums."""
COLUMNS = sum(WIDTHS.values())


def columns(name: str) -> slice:
    """Where `name` lies among the columns."""
    names = list(WIDTHS)
    begin = sum(WIDTHS[earlier] for earlier in names[: names.index(name)])
    return slice(begin, begin + WIDTHS[name])


@torch.no_grad()
def head_sums(reading: MemoryReading) -> Tensor:
    """[H, COLUMNS] float64 of one layer in one forward."""
    decides = reading.plan.positions > 0
    places = sampled_places(decides.shape[1], decides.device)
    found = _of_all_tokens(reading, decides) | _of_samples(reading, decides[:, places], places)
    return torch.cat([found[name].double().reshape(-1, width) for name, width in WIDTHS.items()], dim=1)


def sampled_places(tokens: int, device: torch.device) -> Tensor:
    """[M] int64 of 0 to `tokens` - 1, rising: all where there are no more than SAMPLED_TOKENS."""
    if tokens <= SAMPLED_TOKENS:
        return torch.arange(tokens, device=device)
    # One in each equal part of the row; squares times the golden ratio, modulo 1, place it there without a pattern.
    # Made on the device: a copy from the host would wait for it.
    index = torch.arange(SAMPLED_TOKENS, dtype=torch.float64, device=device)
    golden, part = (5**0.5 - 1) / 2, tokens / SAMPLED_TOKENS
    within = (index + 1).square() * golden % 1 * (tokens // SAMPLED_TOKENS)
    return (index * part).long() + within.long()


def _of_all_tokens(reading: MemoryReading, decides: Tensor) -> dict[str, Tensor]:
    """Sums over the tokens [B, T] that decide."""
    plan, mask = reading.plan, decides[..., None]
    inner = plan.boundary & mask
    score = plan.score.double() * mask
    bins = (plan.score / SCORE_WIDTH).long().clamp(0, SCORE_BINS - 1)
    gates = torch.zeros_like(inner) if reading.gates is None else inner
    p = torch.ones_like(score) if reading.gates is None else reading.gates.double()
    return {
        "decisions": mask.sum((0, 1)).expand(inner.shape[2]),
        "boundaries": inner.sum((0, 1)),
        "score": score.sum((0, 1)),
        "gates": gates.sum((0, 1)),
        "gate_distance": (torch.minimum(p, 1 - p) * gates).sum((0, 1)),
        "score_histogram": _histogram(bins, mask.expand_as(bins), SCORE_BINS),
    }


def _of_samples(reading: MemoryReading, decides: Tensor, places: Tensor) -> dict[str, Tensor]:
    """Sums over the sampled tokens `places` [M], of which those of `decides` [B, M] count."""
    plan = reading.plan
    starts = plan.slots_at(places).long()
    live = (starts != NO_SLOT) & decides[:, :, None, None]
    end = torch.cat([(places + 1)[None, :, None, None].expand(*starts.shape[:3], 1), starts[..., :-1]], dim=-1)
    length = torch.where(live, end - starts, 0)
    age = torch.where(live, places[:, None, None] - starts, 0)
    count = live.sum(-1)
    # after a merge of the pair i the older slot, which has taken the newer one in, is still the i-th oldest
    pair = plan.merged[:, places]
    merges = (pair >= 0) & decides[..., None]
    merge_age = age.gather(-1, (count - 1 - pair).clamp(0, plan.capacity - 1)[..., None])[..., 0] * merges
    weights = _read_weights(reading, starts, places).double() * live
    share = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
    by_age = torch.stack([(share * (_doubling(age) == b)).sum((0, 1, 3)) for b in range(AGE_BINS)], dim=-1)
    return {
        "samples": decides.sum().expand(live.shape[2]),
        "slots": count.sum((0, 1)),
        "slot_tokens": length.sum((0, 1, 3)),
        "merges": merges.sum((0, 1)),
        "merge_age": merge_age.sum((0, 1)),
        "entropy": -torch.special.xlogy(share, share).sum((0, 1, 3)),
        "most_entropy": count.double().clamp_min(1).log().sum((0, 1)),
        "open_share": share[..., 0].sum((0, 1)),
        "slot_tokens_histogram": _histogram(_doubling(length), live, AGE_BINS),
        "merge_age_histogram": _histogram(_doubling(merge_age), merges, AGE_BINS),
        "read_share_by_age": by_age,
    }


def _read_weights(reading: MemoryReading, starts: Tensor, places: Tensor) -> Tensor:
    """[B, M, H, S] weights that the read at `places` used, gates applied."""
    weights = reading.weights[:, places]
    if reading.gates is None:
        return weights
    opened = starts[..., :-1]  # the boundary between ranks r and r-1 opened the slot of rank r-1
    tokens = reading.gates.transpose(1, 2)[:, None].expand(-1, len(places), -1, -1)
    gates = tokens.gather(-1, opened.clamp_min(0))
    if reading.carried_gates is not None:
        same = opened[..., None] == reading.plan.carried_start[:, None, :, None, :]
        used = torch.arange(reading.plan.capacity, device=starts.device) < reading.plan.carried_fill[..., None]
        carried = (same & used[:, None, :, None, :]) * reading.carried_gates[:, None, :, None, :]
        gates = torch.where(opened < 0, carried.sum(-1).to(gates), gates)
    between = torch.cat([torch.ones_like(gates[..., :1]), gates.where(opened != NO_SLOT, 1.0)], dim=-1)
    return soften(weights, between.to(weights))


def _doubling(tokens: Tensor) -> Tensor:
    """Bin of each number of tokens; 0 falls into the first."""
    powers = 2 ** torch.arange(AGE_BINS, device=tokens.device)
    return (torch.bucketize(tokens.contiguous(), powers, right=True) - 1).clamp_min(0)


def _histogram(bins: Tensor, counted: Tensor, number: int) -> Tensor:
    """[H, number] float64: how many of `bins` [B, T, H, ...] that are `counted` fall into each."""
    bins, counted = (x.transpose(0, 2).flatten(1) for x in (bins, counted))
    zeros = torch.zeros(len(bins), number, dtype=torch.float64, device=bins.device)
    return zeros.scatter_add(1, bins, counted.double())


def named(sums: Tensor) -> Mapping[str, Tensor]:
    """Sums [..., COLUMNS] by name: [...] each, histograms [..., bins]."""
    parts = {name: sums[..., columns(name)] for name in WIDTHS}
    return {name: part[..., 0] if WIDTHS[name] == 1 else part for name, part in parts.items()}
