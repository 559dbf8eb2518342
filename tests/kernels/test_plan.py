"""The planner: scores, boundaries, merges; the chunkwise form against the token loop and against the text of the
paper."""

import itertools

import pytest
import torch
from kernel_cases import BACKBONES, PACKED, capacity_of, make_case, plan_options
from tolerances import SCORE_ABSOLUTE

import dla_kernels as dk
from dla_kernels.plan import NO_SLOT


def assert_same_plan(a: dk.MemoryPlan, b: dk.MemoryPlan) -> None:
    assert (a.score - b.score).abs().max() < SCORE_ABSOLUTE
    assert torch.equal(a.boundary, b.boundary)
    assert torch.equal(a.merged, b.merged)
    assert torch.equal(a.death, b.death)
    assert torch.equal(a.slot_starts(), b.slot_starts())


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("drift", ["token", "update"])
@pytest.mark.parametrize("rule", ["density", "mass", "oldest", "random"])
@pytest.mark.parametrize("packed", [False, True])
def test_chunkwise_plan_equals_the_token_loop(backbone, drift, rule, packed):
    case = make_case(backbone)
    options = plan_options("dla", drift) | {"capacity_rule": rule, "cu_seqlens": PACKED if packed else None}
    loop = dk.plan_memory(*case.keys, **options, backend="recurrent")
    assert 0.1 < loop.boundary.float().mean() < 0.95, "the case must hold both boundaries and none"
    assert (loop.merged >= 0).any()
    for chunk in (1, 8, 64):
        assert_same_plan(dk.plan_memory(*case.keys, **options, backend="torch", chunk_size=chunk), loop)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("tokens", [1, 2, 31, 33])
def test_plan_of_float32_inputs_equals_the_token_loop_at_any_length(backbone, tokens):
    case = make_case(backbone, tokens=tokens, dtype=torch.float32, key_heads=2, heads=4)
    options = plan_options("dla")
    assert_same_plan(dk.plan_memory(*case.keys, **options), dk.plan_memory(*case.keys, **options, backend="recurrent"))


def test_score_is_the_distance_of_rms_normalised_writes():
    """I_t = ||rms(s_t) - rms(S_open)|| / ||rms(S_open)||, computed as the paper writes it, on one segment."""
    case = make_case("mamba2", batch=1, heads=1, tokens=12)
    plan = dk.plan_memory(*case.keys, tau=9.0, capacity=4)
    state = torch.zeros(5, 4, dtype=torch.float64)

    def rms(x):
        return x / x.square().mean().sqrt()

    for t in range(12):
        write = torch.outer(case.k[0, t, 0], case.v[0, t, 0])
        if t:
            expected = (rms(write) - rms(state)).norm() / rms(state).norm()
            assert plan.score[0, t, 0].item() == pytest.approx(expected.item(), abs=1e-5)
        state = case.log_decay[0, t, 0].exp() * state + write


@pytest.mark.parametrize("backend", ["recurrent", "torch", "triton"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_score_equal_to_tau_begins_a_slot(backbone, backend):
    """Writes in turn along two axes: each is orthogonal to the one before, and their distance is sqrt(2) exactly."""
    tokens = 20
    k = torch.eye(2).repeat(tokens // 2, 1)[None, :, None]
    decay, beta = torch.zeros(1, tokens, 1), torch.ones(1, tokens, 1) if backbone == "gated_deltanet" else None
    keys = (k, torch.ones(1, tokens, 1, 2), decay, beta)
    equal = torch.tensor([2.0]).sqrt()
    for tau, all_begin in ((equal, True), (equal.nextafter(torch.tensor([2.0])), False)):
        plan = dk.plan_memory(*keys, tau=tau, capacity=4, backend=backend, chunk_size=16)
        assert plan.boundary.all().item() is all_begin

        cache = dk.MergeCache.empty(1, 1, 4, 2, 2)
        for t in range(3):
            now = (None if x is None else x[:, t] for x in (k, *keys))
            dk.dla_step(
                *now, read_weights=torch.ones(1, 1, 4), tau=tau, cache=cache,
                backend="triton" if backend == "triton" else "torch",
            )  # fmt: skip
        assert int(cache.fill) == (3 if all_begin else 1)


@pytest.mark.parametrize("backend", ["recurrent", "torch", "triton"])
def test_a_token_that_writes_with_strength_0_is_scored_as_any_other(backend):
    """s_t = k_t v_t^T whatever the strength: what the open state holds already begins no slot, what opposes it does."""
    k = torch.eye(2)[[0, 0, 0, 0]][None, :, None]
    v = torch.tensor([1.0, 1.0, -1.0, -1.0])[None, :, None, None] * torch.ones(2)
    keys = (k, v, torch.zeros(1, 4, 1), torch.tensor([1.0, 0.0, 0.0, 1.0])[None, :, None])
    plan = dk.plan_memory(*keys, tau=2.5, capacity=4, backend=backend, chunk_size=16)
    assert plan.score.flatten().tolist() == [0, 0, 2, 2]

    cache = dk.MergeCache.empty(1, 1, 4, 2, 2)
    summed = []
    for t in range(4):
        now = (x[:, t] for x in (k, *keys))
        step = "triton" if backend == "triton" else "torch"
        dk.dla_step(*now, read_weights=torch.ones(1, 1, 4), tau=2.5, cache=cache, backend=step)
        summed.append(float(cache.scores.sum()))
    assert summed == [0, 0, 2, 4]


def test_merges_of_a_worked_example():
    """Scores 0, 2, 1, 0.5, 2 at tau 0.4, capacity 3: every token opens a slot; sums of pairs decide, the oldest pair
    on ties."""
    from dla_kernels.memory.merging import capacity_merges
    from dla_kernels.memory.reference import recurrent_merges

    score = torch.tensor([[[0.0, 2.0, 1.0, 0.5, 2.0, 2.0]]])
    every = torch.ones(1, 1, 6, dtype=torch.bool)
    none = torch.zeros(1, 1, 3, dtype=torch.int64)
    for merges_of in (capacity_merges, recurrent_merges):
        merges = merges_of(
            every,
            score,
            torch.zeros(1, 6, dtype=torch.int64),
            capacity=3,
            rule="density",
            carried_start=none,
            carried_scores=none.double(),
            carried_fill=none[..., 0],
        )
        # t=3: pairs {0},{1}: 2/2 and {1},{2}: 3/2 -> 0. t=4: {0,1},{2}: 3/3; {2},{3}: 1.5/2 -> 1. t=5:
        # {01},{23}: 3.5/4; {23},{4}: 3.5/3 -> 0
        assert merges.merged.flatten().tolist() == [-1, -1, -1, 0, 1, 0]
        assert merges.death.flatten().tolist()[1:4] == [3, 5, 4]


@pytest.mark.parametrize("rule", ["density", "mass", "oldest", "random"])
def test_merges_of_long_documents_of_different_length_equal_the_token_loop(rule):
    """Hundreds of merges a list, lists that end at different times, and slots carried in."""
    from dla_kernels.memory.merging import capacity_merges
    from dla_kernels.memory.reference import recurrent_merges

    generator = torch.Generator().manual_seed(0)
    score = 2 * torch.rand(1, 2, 900, generator=generator)
    index = torch.arange(900)
    document = torch.where(index < 40, -7, torch.where(index < 560, 40, 560))[None]
    boundary = (torch.rand(1, 2, 900, generator=generator) < 0.8) | (document == index)[:, None]
    carried = {
        "carried_start": torch.tensor([[[-7, -4, -2, -1], [-7, -3, 0, 0]]]),
        "carried_scores": torch.tensor([[[3.0, 1.0, 0.5, 1.5], [2.0, 4.0, 0.0, 0.0]]]).double(),
        "carried_fill": torch.tensor([[4, 2]]),
    }
    results = [
        merges_of(boundary, score, document, capacity=4, rule=rule, **carried)
        for merges_of in (capacity_merges, recurrent_merges)
    ]
    assert (results[0].merged[..., 560:] >= 0).sum(-1).min() > 256
    assert (results[0].carried_death < 900).any()
    for name in ("death", "carried_death", "merged"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name


def test_ties_between_pairs_fall_to_the_oldest():
    zeros = torch.zeros(1, 20, 1, 3)
    plan = dk.plan_memory(zeros, zeros, torch.zeros(1, 20, 1), tau=0.6, capacity=3)
    assert torch.allclose(plan.score[0, 1:, 0], torch.tensor(2.0).sqrt()), "a zero key has cosine 0"
    # Scores all equal: the first token's is 0, so the oldest pair is also the least dense.
    assert (plan.merged[0, 3:, 0] == 0).all()
    assert plan.slot_starts()[0, -1, 0].tolist() == [0, 18, 19]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("policy", ["log_linear", "fixed", "dla"])
@pytest.mark.parametrize("packed", [False, True])
def test_slots_are_ordered_cover_every_token_once_and_stay_within_capacity(backbone, policy, packed):
    case = make_case(backbone)
    plan = dk.plan_memory(*case.keys, **plan_options(policy), cu_seqlens=PACKED if packed else None)
    starts = plan.slot_starts()
    assert starts.shape == (2, 45, 2, capacity_of(policy))
    live = (starts >= 0).sum(-1)
    assert torch.equal(live, plan.live_slots())
    assert live.min() >= 1
    for b, t, h in [(b, t, h) for b in range(2) for t in range(45) for h in range(2)]:
        mine = starts[b, t, h, : live[b, t, h]]
        assert mine[0] == plan.document_start[b, t], "the oldest slot begins with the document: every token is covered"
        assert (mine.diff() > 0).all() and mine[-1] <= t
        newest = plan.boundary[b, : t + 1, h].nonzero().max()
        assert mine[-1] == newest, "the open slot starts at the latest boundary"


def test_boundaries_do_not_depend_on_capacity():
    case = make_case("gated_deltanet")
    plans = [dk.plan_memory(*case.keys, tau=0.9, capacity=capacity) for capacity in (2, 5, 45)]
    assert all(torch.equal(plans[0].boundary, plan.boundary) for plan in plans)
    assert not torch.equal(plans[0].merged, plans[1].merged)
    assert (plans[2].merged == -1).all()


def test_a_threshold_above_2_makes_one_slot():
    case = make_case("mamba2")
    assert dk.plan_memory(*case.keys, tau=2.01, capacity=4).boundary.sum() == 2 * 2


def test_a_threshold_of_0_and_room_for_all_make_one_slot_a_token():
    case = make_case("gated_deltanet")
    plan = dk.plan_memory(*case.keys, tau=0.0, capacity=45)
    assert plan.boundary.all()
    assert torch.equal(plan.live_slots()[0, :, 0], torch.arange(1, 46))


def test_capacity_1_makes_one_slot():
    case = make_case("mamba2")
    assert (dk.plan_memory(*case.keys, tau=0.1, capacity=1).live_slots() == 1).all()


def test_log_linear_slots_are_the_fenwick_partition():
    """Level of token s at t is the bit length of t xor s (arXiv 2506.04761)."""
    case = make_case("mamba2", tokens=45)
    plan = dk.plan_memory(*case.keys, tau=0.6, capacity=7, policy="log_linear")
    starts = plan.slot_starts()[0, :, 0]
    levels = dk.log_linear_levels(torch.arange(45), 7, levels=7)
    for t in range(45):
        for s in range(t + 1):
            rank = int((starts[t] >= 0).sum()) - 1 - int((starts[t][starts[t] >= 0] <= s).sum() - 1)
            assert levels[t, rank] == (t ^ s).bit_length()


def test_levels_beyond_the_trained_ones_take_the_last():
    assert dk.log_linear_levels(torch.tensor([0b11010000]), 8, levels=5)[0].tolist() == [0, 4, 4, 4, 4, 4, 4, 4]


def test_log_linear_refuses_a_document_beyond_its_slots():
    case = make_case("mamba2", tokens=33)
    with pytest.raises(ValueError, match="capacity >= 7"):
        dk.plan_memory(*case.keys, tau=0.6, capacity=6, policy="log_linear")


def test_fixed_opens_a_slot_every_interval_of_each_document():
    case = make_case("mamba2")
    plan = dk.plan_memory(*case.keys, tau=0.6, capacity=45, policy="fixed", interval=5, cu_seqlens=PACKED)
    assert torch.equal(plan.boundary[..., 0], plan.positions % 5 == 0)
    assert plan.boundary[0, :, 0].nonzero().flatten().tolist() == [0, 5, 7, 12, 17, 22, 27, 32, 37, 42]


def test_thresholds_may_differ_by_head():
    case = make_case("gated_deltanet")
    plan = dk.plan_memory(*case.keys, tau=torch.tensor([0.2, 2.1]), capacity=45)
    assert plan.boundary[..., 0].sum() > 30
    assert plan.boundary[..., 1].sum() == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"policy": "dlaa"}, "policy='dlaa'"),
        ({"drift": "tok"}, "drift='tok'"),
        ({"capacity_rule": "newest"}, "capacity_rule='newest'"),
        ({"capacity": 0}, "capacity=0"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"cu_seqlens": torch.tensor([0, 7, 7, 90])}, "rise strictly"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "end at B\\*T=90"),
    ],
)
def test_a_wrong_option_is_named(change, message):
    case = make_case("mamba2")
    with pytest.raises(ValueError, match=message):
        dk.plan_memory(*case.keys, **({"tau": 0.6, "capacity": 4} | change))


def test_a_wrong_shape_is_named():
    case = make_case("mamba2", heads=3, key_heads=3)
    with pytest.raises(ValueError, match="3 heads, not a multiple of the 2 key heads"):
        dk.plan_memory(case.k[:, :, :2], case.v, case.log_decay, tau=0.6, capacity=4)
    with pytest.raises(ValueError, match="log_decay has shape"):
        dk.plan_memory(case.k, case.v, case.log_decay[:, :, :1], tau=0.6, capacity=4)


@pytest.mark.parametrize("policy", ["single", "log_linear", "fixed", "dla"])
def test_live_slots_are_counted_across_a_carried_cache_and_packed_documents(policy):
    case = make_case("mamba2")
    first, rest = case.tokens(0, 20), case.tokens(20, 45)
    options = plan_options(policy)
    ones = torch.ones(2, 20, 2, options["capacity"], dtype=torch.float64)
    plan = dk.plan_memory(*first.keys, **options)
    _, cache = dk.dla_attention(*first.all, read_weights=ones, plan=plan, return_cache=True)
    for cu_seqlens in (None, torch.tensor([0, 11, 25, 26, 50])):
        after = dk.plan_memory(*rest.keys, **options, cache=cache, cu_seqlens=cu_seqlens)
        assert torch.equal((after.slot_starts() >= 0).sum(-1), after.live_slots())


@pytest.mark.parametrize("policy", ["single", "log_linear", "fixed", "dla"])
@pytest.mark.parametrize("packed", [None, torch.tensor([0, 11, 25, 26, 50])])
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_slots_at_some_tokens_are_those_of_all_tokens_newest_first(policy, packed, chunk):
    """Also those a cache carries in, whose tokens lie before the row."""
    case = make_case("mamba2")
    first, rest = case.tokens(0, 20), case.tokens(20, 45)
    options = plan_options(policy) | {"chunk_size": chunk}
    ones = torch.ones(2, 20, 2, options["capacity"], dtype=torch.float64)
    before = dk.plan_memory(*first.keys, **options)
    _, cache = dk.dla_attention(*first.all, read_weights=ones, plan=before, return_cache=True)
    plan = dk.plan_memory(*rest.keys, **options, cache=cache, cu_seqlens=packed)
    tokens = torch.tensor([0, 3, 4, 11, 24])
    found, starts = plan.slots_at(tokens), plan.slot_starts()[:, tokens]
    assert found.shape == (2, 5, 2, options["capacity"])
    for row, token, head in itertools.product(range(2), range(5), range(2)):
        origin = int(plan.origin[row, head])
        live = [start - origin for start in starts[row, token, head].tolist() if start >= 0]
        missing = options["capacity"] - len(live)
        assert found[row, token, head].tolist() == [*reversed(live), *[NO_SLOT] * missing]
