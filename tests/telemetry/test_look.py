"""What a look adds up equals a plain walk over tokens and slots, and reads as numbers that say so."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dla_train.config import Config
from dla_train.models import LanguageModel
from dla_train.models.build import build_model
from dla_train.models.mixer import MemoryReading
from dla_train.parallel.mesh import Mesh
from dla_train.telemetry import MemoryLook
from dla_train.telemetry.sums import (
    AGE_BINS,
    SAMPLED_TOKENS,
    SCORE_BINS,
    SCORE_WIDTH,
    WIDTHS,
    head_sums,
    named,
    sampled_places,
)

ONE_RANK = Mesh(rank=0, size=1, device=torch.device("cpu"), owns_group=False)
TOKENS = torch.randint(0, 320, (2, 48), generator=torch.Generator().manual_seed(7))
OFFSETS = torch.tensor([0, 1, 17, 48, 60, 96])
MakeConfig = Callable[..., Config]


def model_of(tiny: MakeConfig, *overrides: str) -> LanguageModel:
    """In training mode, with weights and gains that make heads, slots and gates differ."""
    model = build_model(tiny("memory.capacity=4", "memory.tau=1.35", "memory.gain_init=0.7", *overrides), "cpu").train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reader.slots" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def reading_of(model: LanguageModel, layer: int = 1, **options: Any) -> MemoryReading:
    """What `layer` does with TOKENS."""
    seen: dict[int, MemoryReading] = {}
    model(TOKENS, OFFSETS, gate_temperature=0.2, observe=seen.__setitem__, **options)
    return seen[layer]


def walk(reading: MemoryReading, row: int, head: int, found: dict[str, Any]) -> None:
    """Add up one head and row token by token, by lists."""
    plan, gates = reading.plan, reading.gates
    death, boundary = plan.death[row, :, head].tolist(), plan.boundary[row, :, head].tolist()
    starts: list[int] = []
    for t, start in enumerate(plan.document_start[row].tolist()):
        starts = [] if start == t else starts
        before = list(starts)
        starts = [a for a in starts if death[a] > t]
        merged_into = [before[before.index(a) - 1] for a in before if a not in starts]
        starts += [t] if boundary[t] else []
        if start == t:
            continue
        score = float(plan.score[row, t, head])
        found["decisions"] += 1
        found["score"] += score
        found["score_histogram"][min(int(score / SCORE_WIDTH), SCORE_BINS - 1)] += 1
        if boundary[t]:
            found["boundaries"] += 1
            if gates is not None:
                p = float(gates[row, t, head])
                found["gates"] += 1
                found["gate_distance"] += min(p, 1 - p)
        for older in merged_into:
            found["merges"] += 1
            found["merge_age"] += t - older
            found["merge_age_histogram"][int(math.log2(t - older))] += 1
        weights: list[float] = []
        for rank, opened in enumerate(reversed(starts)):
            weight = float(reading.weights[row, t, head, rank])
            if rank and gates is not None:
                p = float(gates[row, starts[len(starts) - rank], head])
                weight = p * weight + (1 - p) * weights[-1]
            weights.append(weight)
            end = t + 1 if rank == 0 else starts[len(starts) - rank]
            found["slots"] += 1
            found["slot_tokens"] += end - opened
            found["slot_tokens_histogram"][int(math.log2(end - opened))] += 1
        shares = [weight / sum(weights) for weight in weights]
        found["samples"] += 1
        found["entropy"] -= sum(share * math.log(share) for share in shares)
        found["most_entropy"] += math.log(len(starts))
        found["open_share"] += shares[0]
        for share, opened in zip(shares, reversed(starts), strict=True):
            found["read_share_by_age"][int(math.log2(max(t - opened, 1)))] += share


def assert_sums(actual: Tensor, expected: dict[str, Any]) -> None:
    for name, value in named(actual).items():
        wanted = torch.as_tensor(expected[name], dtype=torch.float64)
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("memory.capacity_rule=oldest", "memory.drift=update", "memory.tau=0.7"),
        ("memory.gate=hard",),
        ("memory=fixed", "memory.interval_tokens=5", "memory.capacity=4", "memory.tau=0.6"),
    ],
)
def test_sums_are_those_of_a_walk_over_tokens_and_slots(tiny: MakeConfig, overrides: tuple[str, ...]) -> None:
    reading = reading_of(model_of(tiny, *overrides))
    sums = head_sums(reading)
    for head in range(2):
        expected: dict[str, Any] = defaultdict(float)
        expected |= {name: [0.0] * width for name, width in WIDTHS.items() if width > 1}
        for row in range(2):
            walk(reading, row, head, expected)
        assert expected["merges"] > 2 and expected["boundaries"] > 10
        assert (expected["gates"] > 0) == (not {"memory.gate=hard", "memory=fixed"} & set(overrides))
        assert_sums(sums[head], expected)


def test_a_row_in_segments_adds_up_to_the_whole_row(tiny: MakeConfig) -> None:
    """With soft gates, of which those of carried slots come from the cache."""
    model = model_of(tiny)
    whole, parts = (MemoryLook(model, ONE_RANK) for _ in range(2))
    model(TOKENS, gate_temperature=0.2, observe=whole)
    caches = None
    for begin in (0, 16, 32):
        part = TOKENS[:, begin : begin + 16]
        output = model(part, caches=caches, return_caches=True, gate_temperature=0.2, observe=parts)
        caches = output.caches
    expected, found = (named(look._sums) for look in (whole, parts))
    assert float(expected["gate_distance"].min()) > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_recomputed_layer_is_looked_at_once_and_gradients_are_those_without_a_look(tiny: MakeConfig) -> None:
    found = []
    for recompute, looks in ((False, True), (True, True), (True, False)):
        model = model_of(tiny)
        model.recompute = recompute
        look = MemoryLook(model, ONE_RANK)
        logits = model(TOKENS, OFFSETS, observe=look if looks else None).logits
        logits.float().logsumexp(-1).mean().backward()
        found.append((look._sums, {name: p.grad for name, p in model.named_parameters()}, model.memory_statistics()))
    assert torch.equal(found[0][0], found[1][0]) and found[2][0].count_nonzero() == 0
    for gradients in (found[1][1], found[2][1]):
        assert all(torch.equal(gradient, found[0][1][name]) for name, gradient in gradients.items())
    assert torch.equal(found[1][2], found[2][2])


def test_sampled_places_are_distinct_in_order_and_at_every_phase() -> None:
    device = torch.device("cpu")
    assert sampled_places(SAMPLED_TOKENS, device).tolist() == list(range(SAMPLED_TOKENS))
    for tokens in (65, 100, 1024, 4096, 65536):
        places = sampled_places(tokens, device)
        assert places.min() >= 0 and places.max() < tokens and (places.diff() > 0).all()
        assert len(places) == SAMPLED_TOKENS and places.diff().max() < tokens / 16
        for period in (2, 16, 64):
            phases = torch.bincount(places % period, minlength=period)
            assert (phases > 0).float().mean() > 0.5, (tokens, period)


def test_few_samples_estimate_what_all_tokens_say(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = reading_of(model_of(tiny))
    every = named(head_sums(reading))
    monkeypatch.setattr("dla_train.telemetry.sums.SAMPLED_TOKENS", 12)
    some = named(head_sums(reading))
    assert torch.equal(some["score_histogram"], every["score_histogram"])
    assert some["samples"].max() < 0.3 * every["samples"].min()
    for part, whole in (("slots", "samples"), ("entropy", "samples"), ("slot_tokens", "slots")):
        torch.testing.assert_close(some[part] / some[whole], every[part] / every[whole], rtol=0.3, atol=0)


def test_a_read_names_means_by_layer_and_every_head(tiny: MakeConfig) -> None:
    model = model_of(tiny)
    look = MemoryLook(model, ONE_RANK)
    model(TOKENS, OFFSETS, observe=look)
    found = look.read()
    numbers, detail = found.numbers, found.heads
    sums = named(look._sums)
    assert numbers["memory/merge_age_tokens"] == pytest.approx(float(sums["merge_age"].sum() / sums["merges"].sum()))
    rate = float(sums["boundaries"][1].sum() / sums["decisions"][1].sum())
    assert numbers["memory/boundary_rate/layer_1"] == pytest.approx(rate)
    assert numbers["memory/tau"] == numbers["memory/tau/layer_0"] == pytest.approx(1.35)
    assert numbers["memory/gain"] == pytest.approx(0.7) and numbers["memory/sharpness/layer_1"] == pytest.approx(8.0)
    assert 0 < numbers["memory/gate_distance"] <= 0.5 and 0 < numbers["memory/read_evenness"] <= 1
    assert [(head["layer"], head["head"]) for head in detail["heads"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    last = detail["heads"][3]
    assert last["live_slots"] == pytest.approx(float(sums["slots"][1, 1] / sums["samples"][1, 1]), rel=1e-4)
    assert sum(last["read_share_by_age"]) == pytest.approx(1, abs=1e-3)
    assert last["score_histogram"] == sums["score_histogram"][1, 1].tolist()
    layer = found.histograms["memory/score_histogram/layer_1"]
    assert layer.counts == sums["score_histogram"][1].sum(0).tolist() and layer.edges[:2] == [0, 0.05]
    assert layer.edges[-1] == 2 and len(found.histograms) == 2 * 4
    assert found.histograms["memory/read_share_by_age/layer_0"].edges[:3] == [1, 2, 4]
    assert (last["tau"], last["gain"]) == pytest.approx((1.35, 0.7)) and len(detail["age_bins_from_tokens"]) == AGE_BINS


def test_a_policy_that_does_not_score_has_no_scores_taus_or_gates(tiny: MakeConfig) -> None:
    for memory in ("fixed", "single", "log_linear"):
        model = build_model(tiny(f"memory={memory}"), "cpu")
        look = MemoryLook(model, ONE_RANK)
        model(TOKENS, observe=look)
        found = look.read()
        numbers, detail = found.numbers, found.heads
        assert not [name for name in found.histograms if "score" in name]
        assert "memory/slot_tokens_histogram/layer_0" in found.histograms
        assert not [name for name in numbers if "score" in name or "tau" in name or "gate" in name]
        assert "tau" not in detail["heads"][0]
        assert ("gain" in detail["heads"][0]) == ("memory/sharpness" in numbers) == (memory == "fixed")
        if memory == "single":
            assert numbers["memory/live_slots"] == 1 and numbers["memory/read_open_share"] == 1


def test_attention_is_not_looked_at(tiny: MakeConfig) -> None:
    model = build_model(tiny("model.backbone=attention", "model.conv_width=0", "memory=none"), "cpu")
    seen: list[int] = []
    model(TOKENS, observe=lambda layer, reading: seen.append(layer))
    assert seen == []
