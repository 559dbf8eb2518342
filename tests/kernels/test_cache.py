"""MergeCache: splitting a sequence anywhere, decoding token by token, packed documents, and the fixed size."""

import pytest
import torch
from kernel_cases import BACKBONES, PACKED, POLICIES, make_case, plan_options
from tolerances import assert_close

import dla_kernels as dk

ROUTING = {"gain": torch.tensor([1.5, 0.7]), "sharpness": torch.tensor([4.0, 8.0])}


def run(case, policy, closed, weights, *, cache=None, cu_seqlens=None, **options):
    """One whole layer with content reads on q and k: plan, affinity, mixing."""
    plan = dk.plan_memory(*case.keys, **plan_options(policy), cache=cache, cu_seqlens=cu_seqlens, **options)
    affinity = dk.slot_affinity(case.q, case.k, plan, cache=cache, **options)
    read = dk.content_read_weights(weights, affinity, **{name: x.double() for name, x in ROUTING.items()})
    return dk.dla_attention(
        *case.all,
        read_weights=read,
        plan=plan,
        closed_slots=closed,
        routing_keys=case.k,
        cache=cache,
        return_cache=True,
        **options,
    )


def weights_for(case, policy):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(*case.v.shape[:3], plan_options(policy)["capacity"], generator=generator, dtype=torch.float64)


def empty_cache(case, policy, dtype=torch.float64):
    batch, _, heads, value_dim = case.v.shape
    return dk.MergeCache.empty(
        batch,
        heads,
        plan_options(policy)["capacity"],
        case.k.shape[-1],
        value_dim,
        routing_dim=case.k.shape[-1],
        dtype=dtype,
    )


def assert_same_cache(actual: dk.MergeCache, expected: dk.MergeCache) -> None:
    for name in ("fill", "position", "counts"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for name in ("states", "key_sums", "gates"):
        assert_close(name, getattr(actual, name), getattr(expected, name))
    assert (actual.scores - expected.scores).abs().max() < 1e-5  # scores are float32 roundings


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("closed", ["transition", "frozen"])
@pytest.mark.parametrize("split", [1, 8, 23, 44])
def test_splitting_a_sequence_anywhere_changes_nothing(backbone, policy, closed, split):
    case = make_case(backbone)
    weights = weights_for(case, policy)
    whole, expected = run(case, policy, closed, weights)
    for options in ({"chunk_size": 8}, {"backend": "recurrent"}):
        first, cache = run(case.tokens(0, split), policy, closed, weights[:, :split], **options)
        second, cache = run(case.tokens(split, 45), policy, closed, weights[:, split:], cache=cache, **options)
        assert_close("o", torch.cat([first, second], 1), whole)
        assert_same_cache(cache, expected)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("closed", ["transition", "frozen"])
def test_decoding_token_by_token_equals_the_whole_sequence(backbone, policy, closed):
    case = make_case(backbone)
    weights = weights_for(case, policy)
    whole, expected = run(case, policy, closed, weights)
    cache = empty_cache(case, policy)
    pointers = [cache.states.data_ptr(), cache.scores.data_ptr()]
    options = plan_options(policy)
    options.pop("capacity")
    outputs = []
    for t in range(45):
        now = case.map(lambda x, t=t: x[:, t])
        outputs.append(
            dk.dla_step(
                *now.all,
                read_weights=weights[:, t],
                cache=cache,
                closed_slots=closed,
                rho=now.q,
                kappa=now.k,
                **{name: x.double() for name, x in ROUTING.items()},
                **options,
            )
        )
    assert_close("o", torch.stack(outputs, 1), whole)
    assert_same_cache(cache, expected)
    assert pointers == [cache.states.data_ptr(), cache.scores.data_ptr()], "the cache is updated in place"


@pytest.mark.parametrize("drift", ["token", "update"])
@pytest.mark.parametrize("rule", ["density", "mass", "oldest", "random"])
def test_decoding_agrees_under_every_drift_and_capacity_rule(drift, rule):
    case = make_case("gated_deltanet")
    options = plan_options("dla", drift) | {"capacity_rule": rule}
    plan = dk.plan_memory(*case.keys, **options)
    weights = weights_for(case, "dla")
    whole = dk.dla_attention(*case.all, read_weights=weights, plan=plan)
    cache = empty_cache(case, "dla")
    options.pop("capacity")
    outputs = [
        dk.dla_step(*case.map(lambda x, t=t: x[:, t]).all, read_weights=weights[:, t], cache=cache, **options)
        for t in range(45)
    ]
    assert_close("o", torch.stack(outputs, 1), whole)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"policy": "dlaa"}, "policy='dlaa'"),
        ({"drift": "tokens"}, "drift='tokens'"),
        ({"capacity_rule": "newest"}, "capacity_rule='newest'"),
        ({"closed_slots": "froze"}, "closed_slots='froze'"),
        ({"rho": torch.zeros(2, 1, 5)}, "all of rho, kappa, gain and sharpness"),
    ],
)
def test_a_wrong_option_of_a_step_is_named_and_changes_nothing(change, message):
    case = make_case("mamba2", tokens=1).map(lambda x: x[:, 0])
    cache = empty_cache(case.map(lambda x: x[:, None]), "dla")
    with pytest.raises(ValueError, match=message):
        dk.dla_step(*case.all, read_weights=torch.ones(2, 2, 4), tau=0.6, cache=cache, **change)
    assert cache.position.sum() == 0 and cache.states.abs().sum() == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_decoding_goes_on_from_a_prefilled_batch_at_different_fill(policy):
    """Two documents of different length side by side: each goes on exactly as it would alone."""
    case = make_case("gated_deltanet")
    weights = weights_for(case, policy)
    lengths, caches = (9, 30), []
    for row, length in enumerate(lengths):
        part = case.rows(row, 0, length)
        caches.append(run(part, policy, "transition", weights[row : row + 1, :length])[1])
    joined = dk.MergeCache(
        **{
            name: torch.cat([getattr(c, name) for c in caches])
            for name in ("states", "counts", "scores", "gates", "fill", "position", "key_sums")
        }
    )
    options = plan_options(policy)
    options.pop("capacity")
    now = make_case("gated_deltanet", seed=9, tokens=1).map(lambda x: x[:, 0])
    routing = {name: x.double() for name, x in ROUTING.items()}

    def step(case, cache, w):
        return dk.dla_step(*case.all, read_weights=w, cache=cache, rho=case.q, kappa=case.k, **routing, **options)

    both = step(now, joined, weights[:, 0])
    for row in range(2):
        alone = step(now.map(lambda x, row=row: x[row : row + 1]), caches[row], weights[row : row + 1, 0])
        assert_close("o", both[row : row + 1], alone)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("closed", ["transition", "frozen"])
def test_packed_documents_equal_documents_alone(backbone, policy, closed):
    case = make_case(backbone)
    weights = weights_for(case, policy)
    packed, cache = run(case, policy, closed, weights, cu_seqlens=PACKED, chunk_size=8)
    edges = PACKED.tolist()
    for begin, end in zip(edges, edges[1:], strict=False):
        row, a, b = begin // 45, begin % 45, begin % 45 + end - begin
        alone, last = run(case.rows(row, a, b), policy, closed, weights[row : row + 1, a:b])
        assert_close("o", packed[row : row + 1, a:b], alone)
        if b == 45:
            one = dk.MergeCache(
                **{
                    name: getattr(cache, name)[row : row + 1]
                    for name in ("states", "counts", "scores", "gates", "fill", "position", "key_sums")
                }
            )
            assert_same_cache(one, last)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("closed", ["transition", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_document_never_sees_another(backbone, policy, closed, dtype):
    """Change a document in every input: all outputs of the others, in its chunk too, are the same to the last bit."""
    case = make_case(backbone, dtype=dtype)
    weights = weights_for(case, policy).to(dtype)
    before, _ = run(case, policy, closed, weights, cu_seqlens=PACKED, chunk_size=64)
    for x in case.all:
        if x is not None:
            x[0, 4:7] *= -0.5 if x.dim() == 4 else 0.37
    after, _ = run(case, policy, closed, weights, cu_seqlens=PACKED, chunk_size=64)
    same = (before == after).all(-1).all(-1)
    assert same[0, :4].all() and same[0, 7:].all() and same[1].all()
    assert not same[0, 4:7].any()


def test_a_packed_row_resets_a_carried_memory():
    case = make_case("mamba2")
    weights = weights_for(case, "dla")
    _, cache = run(case, "dla", "transition", weights)
    more = make_case("mamba2", seed=3)
    o, _ = run(more, "dla", "transition", weights, cache=cache, cu_seqlens=PACKED)
    fresh, _ = run(more, "dla", "transition", weights, cu_seqlens=PACKED)
    assert torch.equal(o[0, 7:], fresh[0, 7:])
    assert not torch.equal(o[0, :7], fresh[0, :7])


def test_the_bytes_of_a_cache_follow_the_formula_and_never_the_context():
    shape = (3, 4, 30, 16, 8)
    cache = dk.MergeCache.empty(*shape, routing_dim=6, conv_channels=10, conv_width=4)
    assert cache.nbytes == dk.MergeCache.nbytes_of(*shape, routing_dim=6, conv_channels=10, conv_width=4)
    sizes = set()
    for tokens in (1, 17, 90):
        case = make_case("mamba2", tokens=tokens)
        sizes.add(run(case, "dla", "transition", weights_for(case, "dla"))[1].nbytes)
    assert len(sizes) == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_counts_and_scores_of_the_slots_sum_to_those_of_the_document(policy):
    case = make_case("gated_deltanet")
    plan = dk.plan_memory(*case.keys, **plan_options(policy), cu_seqlens=PACKED)
    _, cache = run(case, policy, "transition", weights_for(case, policy), cu_seqlens=PACKED)
    assert torch.equal(cache.counts.sum(-1), torch.tensor([[38, 38], [30, 30]]))
    assert torch.equal(cache.position, torch.tensor([38, 30]))
    for row, begin in enumerate((7, 15)):
        expected = plan.score[row, begin:].double().sum(0)
        assert (cache.scores[row].sum(-1) - expected).abs().max() < 1e-9


def test_a_reset_cache_is_an_empty_one_and_so_is_one_carried_to_rows_that_begin_anew():
    case = make_case("mamba2")
    _, cache = run(case, "dla", "transition", weights_for(case, "dla"))
    kept = cache.clone()
    cache.reset()
    assert_same_cache(cache, empty_cache(case, "dla"))
    assert kept.states.abs().sum() > 0
    assert_same_cache(kept.carried(torch.zeros(len(kept.fill), dtype=torch.bool)), cache)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("closed", ["transition", "frozen"])
def test_the_initial_states_of_a_cache_get_gradients(backbone, closed):
    case = make_case(backbone)
    weights = weights_for(case, "dla")
    _, cache = run(case.tokens(0, 20), "dla", closed, weights[:, :20])
    cache.states = cache.states.detach().requires_grad_()
    rest = case.tokens(20, 45)
    plan = dk.plan_memory(*rest.keys, **plan_options("dla"), cache=cache)
    grads = []
    for options in ({"backend": "recurrent"}, {"chunk_size": 8}):
        o, after = dk.dla_attention(
            *rest.all,
            read_weights=weights[:, 20:],
            plan=plan,
            cache=cache,
            closed_slots=closed,
            return_cache=True,
            **options,
        )
        loss = o.square().sum() + after.states.sin().sum()
        grads.append(torch.autograd.grad(loss, cache.states)[0])
    assert_close("d initial states", grads[1], grads[0])


def test_backward_keeps_one_set_of_states_a_chunk():
    """4 slots of 5 x 7, 2 sequences, 2 heads, 45 tokens in chunks of 8: six sets, and no moved or spread copies."""
    case = make_case("gated_deltanet", value_dim=7).map(lambda x: x.requires_grad_())
    plan = dk.plan_memory(*case.keys, **plan_options("dla"), chunk_size=8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        dk.dla_attention(*case.all, read_weights=weights_for(case, "dla"), plan=plan)
    assert saved.count((2, 2, 4, 5, 7)) == 6
    assert (2, 2, 8, 4 * 5) not in saved


def test_a_cache_of_another_shape_is_refused():
    case = make_case("mamba2")
    with pytest.raises(ValueError, match="these inputs need"):
        dk.plan_memory(*case.keys, tau=0.6, capacity=4, cache=dk.MergeCache.empty(2, 2, 5, 5, 4))
