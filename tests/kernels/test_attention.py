"""dla_attention: the chunkwise form against the token loop, the backbones' own oracles, and finite differences."""

import warnings

import pytest
import torch
from kernel_cases import BACKBONES, PACKED, POLICIES, capacity_of, make_case, plan_options
from tolerances import assert_close

import dla_kernels as dk


def weights_for(case, capacity, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*case.v.shape[:3], capacity, generator=generator, dtype=torch.float64).to(case.v.dtype)


def single_state(case):
    plan = dk.plan_memory(*case.keys, tau=0.6, capacity=1, policy="single")
    ones = torch.ones(*case.v.shape[:3], 1, dtype=case.v.dtype)
    return dk.dla_attention(*case.all, read_weights=ones, plan=plan, backend="recurrent")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("closed", ["transition", "frozen"])
@pytest.mark.parametrize("packed", [False, True])
def test_chunkwise_outputs_states_and_gradients_equal_the_token_loop(backbone, policy, closed, packed):
    case = make_case(backbone, key_heads=2, heads=4)
    plan = dk.plan_memory(*case.keys, **plan_options(policy), cu_seqlens=PACKED if packed else None)
    weights = weights_for(case, plan.capacity)
    results = []
    for options in ({"backend": "recurrent"}, {"chunk_size": 8}, {"chunk_size": 64}):
        leaves = [x.clone().requires_grad_() for x in (*case.all, weights) if x is not None]
        beta = leaves[4] if case.beta is not None else None
        o, cache = dk.dla_attention(
            *leaves[:4], beta, read_weights=leaves[-1], plan=plan, closed_slots=closed, return_cache=True, **options
        )
        (o.square().sum() + cache.states.sin().sum()).backward()
        results.append([o.detach(), cache.states.detach(), *(x.grad for x in leaves)])
    names = [
        "o",
        "states",
        "dq",
        "dk",
        "dv",
        "dlog_decay",
        *(["dbeta"] if case.beta is not None else []),
        "dread_weights",
    ]
    for other in results[1:]:
        for name, expected, actual in zip(names, results[0], other, strict=True):
            assert_close(name, actual, expected)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("closed", ["transition", "frozen"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_decays_equal_the_token_loop_where_tokens_do_not_decay(backbone, closed, packed):
    """Cumulative decays are then equal, so that no least or largest of them says at which token it is read."""
    case = make_case(backbone)
    case.log_decay[:, 5:] = 0
    plan = dk.plan_memory(*case.keys, **plan_options("dla"), cu_seqlens=PACKED if packed else None)
    weights = weights_for(case, plan.capacity)
    gradients = []
    for options in ({"backend": "recurrent"}, {"chunk_size": 8}):
        decay = case.log_decay.clone().requires_grad_()
        o = dk.dla_attention(
            case.q, case.k, case.v, decay, case.beta,
            read_weights=weights, plan=plan, closed_slots=closed, **options,
        )  # fmt: skip
        gradients += torch.autograd.grad(o.square().sum(), decay)
    assert_close("dlog_decay", gradients[1], gradients[0])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("closed", ["transition", "frozen"])
def test_gradients_equal_finite_differences_with_the_plan_fixed(backbone, closed):
    case = make_case(backbone, batch=1, tokens=9, key_dim=3, value_dim=2)
    plan = dk.plan_memory(*case.keys, tau=0.2, capacity=2)
    assert (plan.merged >= 0).any()
    beta = () if case.beta is None else (case.beta,)

    def layer(weights, *inputs):
        gate = inputs[4] if beta else None
        return dk.dla_attention(*inputs[:4], gate, read_weights=weights, plan=plan, closed_slots=closed, chunk_size=4)

    leaves = [x.clone().requires_grad_() for x in (weights_for(case, 2), *case.all[:4], *beta)]
    assert torch.autograd.gradcheck(layer, leaves)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("policy", POLICIES)
def test_unit_weights_give_the_single_state_whatever_the_boundaries(backbone, policy):
    case = make_case(backbone)
    plan = dk.plan_memory(*case.keys, **plan_options(policy))
    ones = torch.ones(*case.v.shape[:3], plan.capacity, dtype=torch.float64)
    o, cache = dk.dla_attention(*case.all, read_weights=ones, plan=plan, return_cache=True)
    assert_close("o", o, single_state(case))
    single = dk.plan_memory(*case.keys, tau=0.6, capacity=1, policy="single")
    _, whole = dk.dla_attention(*case.all, read_weights=ones[..., :1], plan=single, return_cache=True)
    assert_close("sum of slot states", cache.states.sum(2), whole.states[:, :, 0])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_chunk_operators_equal_the_token_step_from_any_state(backbone):
    from dla_kernels.backbones.operators import apply_transition, chunk_operators, visible_tokens
    from dla_kernels.backbones.recurrence import transition, write_of

    case = make_case(backbone, batch=1, tokens=9, heads=1)
    q, k, v = (x[:, :, 0] for x in (case.q, case.k, case.v))
    g, beta = case.log_decay[..., 0], None if case.beta is None else case.beta[..., 0]
    states = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    sees = visible_tokens(torch.zeros(1, 9, dtype=torch.int64), 9)
    ops = chunk_operators(*(None if x is None else x[:, None, None] for x in (q, k, g, beta)), sees)
    o = ops.mixing @ v[:, None, None] + ops.query_closed @ states[:, :, None]
    written = ops.key_end.transpose(-1, -2) @ v[:, None, None]
    end = apply_transition(ops.transition_closed.dense()[:, 0], states[:, None])[:, 0] + written[:, 0]
    for t in range(9):
        b = None if beta is None else beta[:, t]
        states = transition(states, k[:, t], g[:, t], b) + write_of(k[:, t], v[:, t], b)[:, None]
        assert_close("o", o[0, 0, 0, t], q[0, t] @ states[0, 0])
    assert_close("state", end[0], states[0])


def fla_rules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package warns that it finds no GPU
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
        from fla.ops.log_linear_attn.naive import naive_log_linear_attn
        from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
    return naive_recurrent_gated_delta_rule, naive_recurrent_simple_gla, naive_log_linear_attn


@pytest.mark.parametrize("backbone", BACKBONES)
def test_unit_weights_equal_flas_naive_rule(backbone):
    delta, gla, _ = fla_rules()
    case = make_case(backbone, heads=2, key_heads=2, dtype=torch.float32, tokens=70)
    plan = dk.plan_memory(*case.keys, tau=0.9, capacity=4)
    o = dk.dla_attention(*case.all, read_weights=torch.ones(2, 70, 2, 4), plan=plan)
    if case.beta is None:
        expected = gla(case.q, case.k, case.v, case.log_decay, scale=5**-0.5)[0]
    else:
        expected = delta(case.q, case.k, case.v, case.beta, case.log_decay, scale=5**-0.5)[0]
    assert_close("o", o, expected)


def test_log_linear_equals_flas_naive_rule():
    _, _, log_linear = fla_rules()
    case = make_case("mamba2", heads=2, key_heads=1, dtype=torch.float32, tokens=64)
    levels = torch.rand(2, 64, 2, 7)
    plan = dk.plan_memory(*case.keys, tau=0.6, capacity=8, policy="log_linear")
    index = dk.log_linear_levels(plan.positions, 8, 7)[:, :, None].expand(2, 64, 2, 8)
    o = dk.dla_attention(*case.all, read_weights=levels.gather(-1, index), plan=plan, scale=1.0)
    assert_close("o", o, log_linear(case.q, case.k, case.v, case.log_decay, levels, scale=1.0))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_slot_a_token_is_the_weighted_mixing_matrix(backbone):
    """tau <= 0 and K >= T: o = (M * w) v, M being the backbone's own mixing matrix."""
    case = make_case(backbone, batch=1, tokens=20, heads=1)
    plan = dk.plan_memory(*case.keys, tau=0.0, capacity=20)
    weights = weights_for(case, 20)
    o = dk.dla_attention(*case.all, read_weights=weights, plan=plan, chunk_size=8)
    unit = torch.eye(20, dtype=torch.float64).view(1, 20, 1, 20)
    probe = make_case(backbone, batch=1, tokens=20, heads=1)
    probe.v = unit
    mixing = single_state(probe)[0, :, 0]
    by_token = torch.stack(
        [torch.stack([weights[0, t, 0, t - s] if s <= t else torch.tensor(0.0) for s in range(20)]) for t in range(20)]
    )
    assert_close("o", o[0, :, 0], (mixing * by_token) @ case.v[0, :, 0])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_capacity_1_is_the_single_state_times_its_weight(backbone):
    case = make_case(backbone)
    plan = dk.plan_memory(*case.keys, tau=0.3, capacity=1)
    weights = weights_for(case, 1)
    assert_close("o", dk.dla_attention(*case.all, read_weights=weights, plan=plan), single_state(case) * weights)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_frozen_segments_are_independent_sequences(backbone):
    """Oracle: run every segment alone, from zero; a closed slot is the state its segment ended with."""
    case = make_case(backbone, batch=1, heads=1, tokens=30)
    plan = dk.plan_memory(*case.keys, tau=0.9, capacity=30)
    weights = weights_for(case, 30)
    o = dk.dla_attention(*case.all, read_weights=weights, plan=plan, closed_slots="frozen", chunk_size=8, scale=1.0)
    edges = [*plan.boundary[0, :, 0].nonzero().flatten().tolist(), 30]
    ends, expected = [], torch.zeros(30, 4, dtype=torch.float64)
    for a, b in zip(edges, edges[1:], strict=False):
        for t in range(a, b):
            part = case.rows(0, a, t + 1)
            single = dk.plan_memory(*part.keys, tau=0.6, capacity=1, policy="single")
            ones = torch.ones(1, t + 1 - a, 1, 1, dtype=torch.float64)
            _, cache = dk.dla_attention(*part.all, read_weights=ones, plan=single, return_cache=True)
            for rank, state in enumerate([cache.states[0, 0, 0], *reversed(ends)]):
                expected[t] += weights[0, t, 0, rank] * (case.q[0, t, 0] @ state)
        ends.append(cache.states[0, 0, 0])
    assert len(ends) > 5
    assert_close("o", o[0, :, 0], expected)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("closed", ["transition", "frozen"])
def test_zero_keys_values_and_a_single_token_are_finite(backbone, closed):
    case = make_case(backbone, tokens=17)
    case.k[:, 3:9] = 0
    case.v[:, 5:12] = 0
    for part in (case, case.tokens(0, 1)):
        part = part.map(lambda x: x.detach().clone().requires_grad_())
        with torch.no_grad():
            plan = dk.plan_memory(*part.keys, tau=0.9, capacity=3)
        o = dk.dla_attention(*part.all, read_weights=weights_for(part, 3), plan=plan, closed_slots=closed)
        o.sum().backward()
        assert o.isfinite().all()
        assert all(x.grad.isfinite().all() for x in part.all if x is not None)


def test_strong_decays_and_repeated_keys_stay_exact_in_float32():
    """Decays of exp(-20) a token would overflow as quotients; equal keys at full strength break a product of powers."""
    case = make_case("gated_deltanet", dtype=torch.float32, tokens=64, decay=20.0)
    case.k[:] = case.k[:, :1]
    case.beta[:] = 1.0
    case.log_decay[:, ::2] = 0.0
    plan = dk.plan_memory(*case.keys, tau=0.9, capacity=4)
    weights = weights_for(case, 4)
    wide = case.map(torch.Tensor.double)
    expected = dk.dla_attention(*wide.all, read_weights=weights.double(), plan=plan, backend="recurrent")
    assert_close("o", dk.dla_attention(*case.all, read_weights=weights, plan=plan), expected.float())


def test_bfloat16_inputs_keep_float32_states():
    case = make_case("gated_deltanet", dtype=torch.bfloat16, tokens=64)
    plan = dk.plan_memory(*case.keys, tau=0.9, capacity=4)
    weights = weights_for(case, 4)
    o, cache = dk.dla_attention(*case.all, read_weights=weights, plan=plan, return_cache=True)
    assert o.dtype == torch.bfloat16 and cache.states.dtype == torch.float32
    expected = dk.dla_attention(*case.map(torch.Tensor.float).all, read_weights=weights.float(), plan=plan)
    assert_close("o", o.float(), expected, torch.bfloat16)


def test_read_weights_of_another_capacity_are_refused():
    case = make_case("mamba2")
    plan = dk.plan_memory(*case.keys, tau=0.9, capacity=4)
    with pytest.raises(ValueError, match="S being the plan's capacity"):
        dk.dla_attention(*case.all, read_weights=weights_for(case, 5), plan=plan)
    with pytest.raises(ValueError, match="closed_slots='froze'"):
        dk.dla_attention(*case.all, read_weights=weights_for(case, 4), plan=plan, closed_slots="froze")


@pytest.mark.parametrize("policy", POLICIES)
def test_capacity_of_the_shared_cases_forces_merges(policy):
    plan = dk.plan_memory(*make_case("mamba2").keys, **plan_options(policy))
    assert plan.capacity == capacity_of(policy)
    assert policy in ("single", "log_linear") or (plan.merged >= 0).any()
