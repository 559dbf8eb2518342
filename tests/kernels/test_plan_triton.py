"""The planner in Triton kernels against the token loop and the chunkwise PyTorch form.

Cosines of float32 inputs summed in two orders differ by less than 2e-6, so squared scores by less than SQUARE_ERROR. No
score of these inputs lies within MARGIN of its threshold and no two densities that a merge chooses between lie closer
than that; both are asserted, so decisions must be equal. Given the same scores, merges must agree on any input.
"""

import functools

import pytest
import torch
from kernel_cases import BACKBONES, make_case
from tolerances import RMS_FLOAT32

import dla_kernels as dk
from dla_kernels.documents import _accepts, document_starts
from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.drift import chunk_drift
from dla_kernels.memory.merging import capacity_merges
from dla_kernels.memory.reference import recurrent_merges

pytest.importorskip("triton", reason="kernels need Triton")

from dla_kernels import launch  # noqa: E402
from dla_kernels.memory import drift_triton, merging_triton  # noqa: E402
from dla_kernels.memory.drift_triton import chunk_drift_triton  # noqa: E402
from dla_kernels.memory.merging_triton import capacity_merges_triton  # noqa: E402

SQUARE_ERROR = 4e-6
MARGIN = 1e-4
TAU = {"token": torch.tensor([-1.0, 0.6, 3.0]), "update": torch.tensor([-1.0, 0.4, 3.0])}
"""A head that opens a slot at every token, one that decides, one that opens none of its own."""
PACKED = torch.tensor([0, 7, 16, 17, 60, 70])


def inputs(backbone, tokens=70):
    """One row, three heads that share their keys; tokens are like the ones before them to every degree, so that scores
    lie everywhere."""
    case = make_case(backbone, tokens=tokens, batch=1, heads=3, key_dim=12, value_dim=20)
    generator = torch.Generator().manual_seed(1)
    new = 0.03 + 0.97 * torch.rand(tokens, generator=generator).double() ** 2
    for x in (case.k, case.v):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        for t in range(1, tokens):
            x[:, t] = (1 - new[t]) * x[:, t - 1] + new[t] * noise[:, t]
    case.k /= case.k.norm(dim=-1, keepdim=True)
    return case.map(lambda x: x.float())


def starts(packed, tokens=70, position=None):
    return document_starts(PACKED if packed else None, 1, tokens, position=position)


def options(drift="token", tau=None, gradients=False):
    return {"tau": TAU[drift] if tau is None else tau, "drift": drift, "cache": None, "gradients": gradients}


def double(case):
    return case.map(lambda x: x.double())


def assert_same_scores(actual, expected):
    """Compares I^2 = 2 - 2 cos: near 0 the root makes 1e-3 of an error of 1e-6."""
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    error = (actual.double().square() - expected.double().square()).abs().max()
    assert error < SQUARE_ERROR, f"squared scores differ by {error:.2g}"


def score_margin(score, tau, begins):
    """Least |score - tau| of tokens that do not begin a document."""
    gap = (score - tau[:, None]).abs()
    return gap.masked_fill((begins == torch.arange(score.shape[-1]))[:, None], torch.inf).min().item()


def density_margin(plan):
    """Least distance between the two least densities that a merge of a plan chose between."""
    least = float("inf")
    for h in range(plan.score.shape[2]):
        slots = []
        for t in range(plan.score.shape[1]):
            if plan.document_start[0, t] == t:
                slots = []
            if plan.boundary[0, t, h]:
                if len(slots) == plan.capacity:
                    density = [(a[0] + b[0]) / (a[1] + b[1]) for a, b in zip(slots, slots[1:], strict=False)]
                    if len(density) > 1:
                        least = min(least, sorted(density)[1] - min(density))
                    pair = int(plan.merged[0, t, h])
                    gone = slots.pop(pair + 1)
                    slots[pair] = [slots[pair][0] + gone[0], slots[pair][1] + gone[1]]
                slots.append([0.0, 0])
            slots[-1][0] += plan.score[0, t, h].item()
            slots[-1][1] += 1
    return least


@functools.cache
def planned(backbone, drift, packed):
    """(inputs, drift in Triton, in float64 PyTorch, in float32 PyTorch), each with gradients, at C = 16."""
    case, begins = inputs(backbone), starts(packed)
    asked = options(drift, gradients=True)
    return (
        case,
        chunk_drift_triton(*case.keys, begins, **asked, chunk=16),
        chunk_drift(*double(case).keys, begins, **asked, chunk=16),
        chunk_drift(*case.keys, begins, **asked, chunk=16),
    )


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("drift", ["token", "update"])
@pytest.mark.parametrize("packed", [False, True])
def test_scores_and_boundaries_equal_the_chunkwise_form_in_float64(backbone, drift, packed):
    case, actual, wide, _ = planned(backbone, drift, packed)
    begins = starts(packed)
    assert score_margin(wide.score, TAU[drift], begins) > MARGIN
    assert torch.equal(actual.boundary, wide.boundary)
    assert_same_scores(actual.score, wide.score)
    assert 0.1 < wide.boundary[:, 1].float().mean() < 0.9, "the second head must decide"
    heads = (begins == torch.arange(70))[:, None].expand_as(wide.boundary)
    assert (actual.score[heads] == 0).all() and actual.boundary[heads].all()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("drift", ["token", "update"])
@pytest.mark.parametrize("packed", [False, True])
def test_score_gradients_are_as_near_float64_as_those_of_pytorch_in_float32(backbone, drift, packed):
    """The root in the score and the differences in the norm lose digits whatever the order of summation, so the
    measure is what PyTorch's float32 loses; the kernels may lose three times that, and RMS_FLOAT32 besides."""
    case, actual, wide, narrow = planned(backbone, drift, packed)
    begins = (starts(packed) == torch.arange(70))[:, None, :, None]
    for name, a, b, c in zip(("k", "v"), actual.gradients, wide.gradients, narrow.gradients, strict=True):
        assert not a.masked_fill(~begins, 0.0).any(), "a document's first token has a fixed score"
        a, b, c = (x.double().masked_fill(begins, 0.0) for x in (a, b, c))
        scale = b.square().mean().sqrt()
        assert scale > 0.01
        error, allowed = ((x - b).square().mean().sqrt() / scale for x in (a, c))
        assert error < RMS_FLOAT32 + 3 * allowed, f"d score / d {name}: {error:.2g}, PyTorch {allowed:.2g}"


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_any_length_gives_the_plan_of_the_token_loop(backbone, tokens):
    case = inputs(backbone, tokens)
    asked = {"tau": TAU["token"], "capacity": 4, "score_gradients": False}
    loop = dk.plan_memory(*double(case).keys, **asked, backend="recurrent")
    plan = dk.plan_memory(*case.keys, **asked, backend="triton", chunk_size=16)
    assert density_margin(loop) > MARGIN
    for name in ("boundary", "merged", "death", "carried_death", "document_start"):
        assert torch.equal(getattr(plan, name), getattr(loop, name)), name
    assert_same_scores(plan.score, loop.score)


@pytest.mark.parametrize(
    "backbone,rule",
    [
        ("mamba2", "density"),
        ("gated_deltanet", "density"),
        ("mamba2", "oldest"),
        ("gated_deltanet", "random"),
        ("mamba2", "mass"),
    ],
)
def test_packed_plans_of_several_rows_equal_the_token_loop(backbone, rule):
    case = make_case(backbone, tokens=45, dtype=torch.float32, heads=2, key_heads=2, key_dim=9, value_dim=6)
    packed = torch.tensor([0, 7, 45, 46, 60, 90])
    asked = {"tau": torch.tensor([0.0, 0.6]), "capacity": 5, "capacity_rule": rule, "cu_seqlens": packed}
    loop = dk.plan_memory(*double(case).keys, **asked, backend="recurrent")
    plan = dk.plan_memory(*case.keys, **asked, backend="triton", chunk_size=32)
    assert (loop.merged >= 0).sum() > 50
    for name in ("boundary", "merged", "death"):
        assert torch.equal(getattr(plan, name), getattr(loop, name)), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_carried_cache_goes_on_as_the_whole_sequence_does(backbone):
    """The cache is cut inside segments that are long, and inside ones that end soon."""
    case = inputs(backbone)
    asked = {"tau": TAU["token"], "capacity": 8, "score_gradients": True}
    whole = dk.plan_memory(*double(case).keys, **asked, backend="torch")
    first = dk.plan_memory(*case.tokens(0, 27).keys, **asked)
    ones = torch.ones(1, 27, 3, 8)
    _, cache = dk.dla_attention(*case.tokens(0, 27).all, read_weights=ones, plan=first, return_cache=True)
    second = dk.plan_memory(*case.tokens(27, 70).keys, **asked, cache=cache, backend="triton", chunk_size=16)
    assert density_margin(whole) > MARGIN
    assert torch.equal(second.boundary, whole.boundary[:, 27:])
    assert torch.equal(second.merged, whole.merged[:, 27:])
    assert_same_scores(second.score, whole.score[:, 27:])
    lived = second.carried_death.amin(-1)
    assert (lived[0, 0] < 43) and (lived[0, 2] > 43), "boundaries from before die in the first head alone"
    for a, b in zip(second.score_gradients, whole.score_gradients, strict=True):
        assert (a - b[:, 27:]).square().mean().sqrt() < 1e-4 * b.square().mean().sqrt()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_long_and_short_segments_in_spans_of_one_chunk_give_the_plan_of_one_span(backbone, monkeypatch):
    case, begins = inputs(backbone), starts(True)
    whole = planned(backbone, "token", True)[1]
    monkeypatch.setattr(drift_triton, "WORKSPACE_BYTES", 1)
    cut = chunk_drift_triton(*case.keys, begins, **options(gradients=True), chunk=16)
    assert torch.equal(cut.score, whole.score) and torch.equal(cut.boundary, whole.boundary)
    assert all(torch.equal(a, b) for a, b in zip(cut.gradients, whole.gradients, strict=True))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_wrong_guess_of_long_segments_changes_nothing(backbone, monkeypatch):
    case, begins = inputs(backbone), starts(False)
    right = planned(backbone, "token", False)[1]
    real, spoiled = drift_triton.launch, []

    def spoil(kernel, grid, *args, **constants):
        if kernel is drift_triton.drift_walk_kernel:
            states, entry, entry_norm = args[13:16]
            states[:, :, 1:] = float("nan")
            entry[:] = -3
            entry_norm[:] = float("nan")
            spoiled.append(kernel)
        real(kernel, grid, *args, **constants)

    monkeypatch.setattr(drift_triton, "launch", spoil)
    repaired = chunk_drift_triton(*case.keys, begins, **options(gradients=True), chunk=16)
    assert spoiled
    assert torch.equal(repaired.score, right.score) and torch.equal(repaired.boundary, right.boundary)
    assert all(torch.equal(a, b) for a, b in zip(repaired.gradients, right.gradients, strict=True))


def test_what_is_packed_before_a_document_changes_no_bit_of_its_plan():
    """The document before is made large and forgotten at once, so that its decays overflow if they are taken for this
    one's."""
    case, begins = inputs("gated_deltanet"), document_starts(torch.tensor([0, 12, 70]), 1, 70)
    once = chunk_drift_triton(*case.keys, begins, **options(gradients=True), chunk=16)
    case.k[:, :12], case.v[:, :12], case.log_decay[:, :12] = case.k[:, :12].flip(-1), 100 * case.v[:, :12], -20.0
    again = chunk_drift_triton(*case.keys, begins, **options(gradients=True), chunk=16)
    assert not torch.equal(again.score[..., :12], once.score[..., :12])
    assert torch.equal(again.score[..., 12:], once.score[..., 12:])
    assert torch.equal(again.boundary[..., 12:], once.boundary[..., 12:])
    assert all(torch.equal(a[:, :, 12:], b[:, :, 12:]) for a, b in zip(again.gradients, once.gradients, strict=True))


def poisoned(x):
    """The same numbers as a view of a larger buffer that is NaN elsewhere."""
    buffer = x.new_full((x.shape[0] + 1, *(2 * n + 1 for n in x.shape[1:])), float("nan"))
    view = buffer[(slice(1, None), *(slice(1, 2 * n + 1, 2) for n in x.shape[1:]))]
    view.copy_(x)
    return view


@pytest.mark.parametrize("backbone", BACKBONES)
def test_nothing_beside_the_inputs_and_nothing_unwritten_is_read(backbone, monkeypatch):
    case, clean = inputs(backbone), planned(backbone, "token", True)[1]
    merges = capacity_merges_triton(clean.boundary, clean.score, starts(True), **lists(3, 4))

    def filled(*shape, dtype=None, device=None):
        like = torch.zeros(*shape, dtype=dtype, device=device)
        return like.fill_(float("nan") if like.is_floating_point() else 3 if like.dtype != torch.bool else 1)

    empty_like = torch.empty_like
    for module in (drift_triton, merging_triton):
        monkeypatch.setattr(module.torch, "empty", filled)
        monkeypatch.setattr(
            module.torch, "empty_like", lambda x, **o: filled(*x.shape, dtype=o.get("dtype", x.dtype), device=x.device)
        )
    again = chunk_drift_triton(
        *(None if x is None else poisoned(x) for x in case.keys), starts(True), **options(gradients=True), chunk=16
    )
    merged = capacity_merges_triton(again.boundary, again.score, starts(True), **lists(3, 4))
    assert torch.empty_like is not empty_like
    assert torch.equal(again.score, clean.score) and torch.equal(again.boundary, clean.boundary)
    assert all(torch.equal(a, b) for a, b in zip(again.gradients, clean.gradients, strict=True))
    assert all(torch.equal(getattr(merged, n), getattr(merges, n)) for n in ("death", "merged", "carried_death"))


def test_two_runs_agree_to_the_last_bit(backbone="gated_deltanet"):
    case, once = inputs(backbone), planned(backbone, "update", False)[1]
    again = chunk_drift_triton(*case.keys, starts(False), **options("update", gradients=True), chunk=16)
    assert torch.equal(again.score, once.score) and torch.equal(again.boundary, once.boundary)
    assert all(torch.equal(a, b) for a, b in zip(again.gradients, once.gradients, strict=True))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_float16_inputs_are_decided_like_their_values_in_float32(backbone):
    """Products of 16-bit numbers are exact, so of the same values no decision may differ. Against inputs that were not
    rounded, decisions differ where rounding moves a score across the threshold: here at under 2% of the tokens."""
    case, begins = inputs(backbone, 64), starts(False, 64)
    half = case.map(lambda x: x.half())
    tau = torch.full((3,), 0.6)
    actual = chunk_drift_triton(*half.keys, begins, **options(tau=tau), chunk=32)
    same = chunk_drift(*half.map(lambda x: x.float()).keys, begins, **options(tau=tau), chunk=16)
    unrounded = chunk_drift(*case.keys, begins, **options(tau=tau), chunk=16)
    assert torch.equal(actual.boundary, same.boundary)
    assert_same_scores(actual.score, same.score)
    assert (actual.boundary != unrounded.boundary).float().mean() < 0.02


def lists(heads, capacity, rule="density", carried=()):
    """Options of capacity_merges; carried: (starts, score sums) of each head's slots."""
    start = torch.zeros(1, heads, capacity, dtype=torch.int64)
    scores = torch.zeros(1, heads, capacity, dtype=torch.float64)
    fill = torch.zeros(1, heads, dtype=torch.int64)
    for h, (begin, total) in enumerate(carried):
        used = min(len(begin), capacity)
        start[0, h, :used] = torch.tensor(begin[:used])
        scores[0, h, :used] = torch.tensor(total[:used], dtype=torch.float64)
        fill[0, h] = used
    return {
        "capacity": capacity,
        "rule": rule,
        "carried_start": start,
        "carried_scores": scores,
        "carried_fill": fill,
    }


CARRIED = (((-70, -40, -20, -9, -1), (3.0, 9.5, 8.0, 1.0, 0.75)), ((-70, -3), (20.0, 0.5)))


def random_lists(tokens, scores, seed=0):
    """(boundaries, scores, document starts) of two heads: documents of 15 (carried), 25, 3 and the other tokens."""
    generator = torch.Generator().manual_seed(seed)
    score = 2 * torch.rand(1, 2, tokens, generator=generator)
    if scores == "tied":
        score = (score * 2).round() / 2
    if scores == "near":
        score = 0.75 + 2e-7 * score
    index = torch.arange(tokens)
    begins = torch.full((1, tokens), -70)
    for edge in (15, 40, 43):
        begins[:, edge:] = edge
    boundary = (torch.rand(1, 2, tokens, generator=generator) < 0.8) | (begins == index)[:, None]
    return boundary, score, begins


def assert_same_merges(actual, boundary, score, begins, asked):
    for merges in (recurrent_merges, capacity_merges):
        expected = merges(boundary, score, begins, **asked)
        for name in ("death", "carried_death", "merged"):
            assert torch.equal(getattr(actual, name), getattr(expected, name)), f"{name} of {merges.__name__}"
    return expected


@pytest.mark.parametrize(
    "rule,capacity,tokens,scores",
    [
        *(("density", 2, 60, scores) for scores in ("spread", "tied")),
        *(("density", 8, 70, scores) for scores in ("spread", "near", "tied")),
        *(("density", 30, 110, scores) for scores in ("spread", "tied")),
        *(("density", 64, 170, scores) for scores in ("spread", "near")),
        *(("mass", 8, 70, scores) for scores in ("spread", "near", "tied")),
        *(("mass", capacity, tokens, "spread") for capacity, tokens in ((2, 60), (30, 110), (64, 170))),
        *(("oldest", capacity, 200, "spread") for capacity in (2, 8, 30, 64)),
        *(("random", capacity, tokens, "spread") for capacity, tokens in ((2, 70), (8, 90), (30, 120), (64, 200))),
    ],
)
def test_merges_equal_the_token_loop(rule, capacity, tokens, scores):
    """Carried slots and documents that begin in other pieces; scores of five values, whose densities tie, and scores so
    near each other that float32 cannot tell densities apart."""
    boundary, score, begins = random_lists(tokens, scores)
    asked = lists(2, capacity, rule, CARRIED)
    with launch.override_tuning(boundary_lists={"BX": 32}):
        actual = capacity_merges_triton(boundary, score, begins, **asked)
    expected = assert_same_merges(actual, boundary, score, begins, asked)
    assert (expected.merged >= 0).sum() > 20
    assert capacity > 8 or (expected.carried_death < tokens).any()


@pytest.mark.parametrize("rule", ["density", "mass"])
def test_pairs_that_are_not_near_are_chosen_in_float32_alone(monkeypatch, rule):
    def refused(*args):
        raise AssertionError("the block is walked again")

    monkeypatch.setattr(merging_triton, "_merge_exactly", refused)
    boundary, score, begins = random_lists(90, "spread", seed=1)
    actual = capacity_merges_triton(boundary, score, begins, **lists(2, 8, rule))
    assert_same_merges(actual, boundary, score, begins, lists(2, 8, rule))
    # what differs by a few errors of float32 is looked at again, like what ties
    for near in (torch.ones(90), 1 + 4e-6 * torch.arange(90)):
        with pytest.raises(Exception, match="walked again"):
            capacity_merges_triton(boundary, near.expand_as(score), begins, **lists(2, 8, rule))


def test_equal_scores_merge_the_oldest_pair():
    zeros = torch.zeros(1, 40, 1, 3)
    plan = dk.plan_memory(zeros, zeros, torch.zeros(1, 40, 1), tau=0.6, capacity=3, backend="triton", chunk_size=16)
    expected = dk.plan_memory(zeros, zeros, torch.zeros(1, 40, 1), tau=0.6, capacity=3, backend="torch")
    assert torch.equal(plan.score, expected.score)
    assert (plan.merged[0, 3:, 0] == 0).all() and torch.equal(plan.death, expected.death)


def test_merges_at_capacity_1_and_an_unknown_rule():
    boundary, score, begins = random_lists(50, "spread")
    alone = capacity_merges_triton(boundary, score, begins, **lists(2, 1, carried=CARRIED))
    assert (alone.merged == -1).all() and (alone.death == dk.plan.NEVER).all()
    assert (alone.carried_death == dk.plan.NEVER).all()
    with pytest.raises(ValueError, match="capacity_rule='newest'"):
        capacity_merges_triton(boundary, score, begins, **lists(2, 4, "newest"))


@pytest.mark.parametrize("policy", ["single", "log_linear", "fixed"])
def test_policies_that_do_not_score_have_one_plan_on_every_backend(policy):
    case = make_case("mamba2", dtype=torch.float32)
    asked = {"tau": 0.6, "capacity": 8 if policy == "log_linear" else 3, "policy": policy, "interval": 3}
    packed = torch.tensor([0, 7, 45, 46, 60, 90])
    plans = [dk.plan_memory(*case.keys, **asked, cu_seqlens=packed, backend=backend) for backend in ("torch", "triton")]
    for name in ("score", "boundary", "merged", "death", "carried_death"):
        assert torch.equal(getattr(plans[0], name), getattr(plans[1], name)), name


@pytest.mark.parametrize("policy", ["single", "log_linear", "fixed", "dla"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_plan_of_meta_tensors_looks_at_no_value(policy, packed):
    k, v, gate = (torch.empty(2, 90, 2, *d, dtype=torch.bfloat16, device="meta") for d in ((64,), (32,), ()))
    offsets = torch.empty(5, dtype=torch.int32, device="meta") if packed else None
    cache = MergeCache.empty(2, 2, 12, 64, 32, device="meta")
    with launch.recording(90) as launches:
        plan = dk.plan_memory(
            k, v, gate, gate, tau=torch.empty(2, device="meta"), capacity=12, policy=policy, cu_seqlens=offsets,
            cache=cache, score_gradients=True, backend="triton",
        )  # fmt: skip
    assert plan.death.shape == (2, 90, 2) and plan.boundary.is_meta
    kernels = {x.kernel.fn.__name__ for x in launches}
    assert ("drift_walk_kernel" in kernels) == (policy == "dla")
    assert ("capacity_walk_kernel" in kernels) == (policy in ("fixed", "dla", "single"))


def test_log_linear_still_refuses_a_document_beyond_its_slots():
    case = make_case("mamba2", tokens=33, dtype=torch.float32)
    for offsets in (None, torch.tensor([0, 33, 66])):
        with pytest.raises(ValueError, match="capacity >= 7"):
            dk.plan_memory(*case.keys, tau=0.6, capacity=6, policy="log_linear", cu_seqlens=offsets, backend="triton")


def test_offsets_on_an_accelerator_are_looked_at_once_a_tensor(monkeypatch):
    good = torch.tensor([0, 7, 45, 90])
    assert _accepts(good, 90) and not _accepts(good, 91)
    assert not any(_accepts(torch.tensor(bad), 90) for bad in ([0, 7, 7, 90], [1, 90], [0, 91], [90], [[0, 90]]))
    assert _accepts(good, 90)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: pytest.fail("a value was read"))
    assert _accepts(good, 90)
    monkeypatch.undo()
    good[1] = 50
    assert not _accepts(good, 90), "the offsets have changed since"
