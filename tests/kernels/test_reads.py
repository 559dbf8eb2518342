"""Affinities, soft gates and content weights."""

import pytest
import torch
from kernel_cases import BACKBONES, PACKED, POLICIES, make_case, plan_options
from tolerances import assert_close

import dla_kernels as dk


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("packed", [False, True])
def test_chunkwise_affinity_and_its_gradients_equal_the_token_loop(policy, packed):
    case = make_case("gated_deltanet", tokens=45, key_heads=1)
    plan = dk.plan_memory(*case.keys, **plan_options(policy), cu_seqlens=PACKED if packed else None)
    results = []
    for options in ({"backend": "recurrent"}, {"chunk_size": 8}):
        rho, kappa = case.q.clone().requires_grad_(), case.k.clone().requires_grad_()
        affinity = dk.slot_affinity(rho, kappa, plan, **options)
        live = affinity > float("-inf")
        affinity.masked_fill(~live, 0.0).square().sum().backward()
        results.append((live, affinity.detach().masked_fill(~live, 0.0), rho.grad, kappa.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][0].sum(-1), plan.live_slots())
    for name, a, b in zip(("affinity", "drho", "dkappa"), results[0][1:], results[1][1:], strict=True):
        assert_close(name, b, a)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("drift", ["token", "update"])
@pytest.mark.parametrize("packed", [False, True])
def test_score_gradients_equal_autograd_with_the_open_state_held_constant(backbone, drift, packed):
    case = make_case(backbone, key_heads=1, heads=2)
    options = plan_options("dla", drift) | {"cu_seqlens": PACKED if packed else None, "score_gradients": True}
    grads = []
    for backend in ({"backend": "recurrent"}, {"chunk_size": 8}):
        plan = dk.plan_memory(*case.keys, **options, **backend)
        k, v = case.k.clone().requires_grad_(), case.v.clone().requires_grad_()
        score = dk.boundary_score(k, v, plan)
        inner = plan.boundary & (plan.positions > 0)[..., None]
        assert torch.equal(score[inner], plan.score[inner]) and (score[~inner] == 0).all()
        grads.append(torch.autograd.grad(score.square().sum(), (k, v)))
    assert grads[0][0].abs().max() > 0.1
    # Scores are rounded to float32, so are their gradients' chains.
    assert_close("dk", grads[1][0], grads[0][0], torch.float32)
    assert_close("dv", grads[1][1], grads[0][1], torch.float32)


def test_score_gradients_agree_across_a_carried_cache():
    case = make_case("gated_deltanet")
    options = plan_options("dla") | {"score_gradients": True}
    whole = dk.plan_memory(*case.keys, **options)
    first = dk.plan_memory(*case.tokens(0, 20).keys, **options)
    ones = torch.ones(2, 20, 2, 4, dtype=torch.float64)
    _, cache = dk.dla_attention(*case.tokens(0, 20).all, read_weights=ones, plan=first, return_cache=True)
    second = dk.plan_memory(*case.tokens(20, 45).keys, **options, cache=cache)
    for split, full in zip(second.score_gradients, whole.score_gradients, strict=True):
        assert_close("score gradient", split, full[:, 20:])


def test_a_plan_without_score_gradients_says_how_to_get_them():
    case = make_case("mamba2")
    with pytest.raises(ValueError, match="score_gradients=True"):
        dk.boundary_score(case.k, case.v, dk.plan_memory(*case.keys, tau=0.9, capacity=4))


def soft_layer(case, weights, tau, temperature, gate="soft", **options):
    plan = dk.plan_memory(
        *(None if x is None else x.detach() for x in case.keys), tau=0.9, capacity=4, score_gradients=True
    )
    score = dk.boundary_score(case.k, case.v, plan)
    gates = dk.boundary_gate(score, plan, tau=tau, temperature=temperature, gate=gate)
    return plan, gates, dk.dla_attention(*case.all, read_weights=weights, plan=plan, gates=gates, **options)


def test_a_gate_is_the_sigmoid_of_the_scores_distance_to_tau():
    case = make_case("gated_deltanet")
    tau = torch.tensor([0.8, 1.1])
    plan, gates, _ = soft_layer(case, torch.ones(2, 45, 2, 4, dtype=torch.float64), tau, 0.3)
    inner = plan.boundary & (plan.positions > 0)[..., None]
    assert_close("gates", gates[inner], torch.sigmoid((plan.score - tau) / 0.3)[inner])
    assert (gates[~inner] == 1).all()


def test_a_cold_gate_is_the_hard_rule():
    """The plan's threshold is 0.9, so no boundary lies within 0.05 of a gate's threshold of 0.85."""
    case = make_case("gated_deltanet")
    weights = torch.rand(2, 45, 2, 4, dtype=torch.float64)
    plan, gates, cold = soft_layer(case, weights, 0.85, 1e-3)
    assert (gates == 1).all()
    assert_close("o", cold, dk.dla_attention(*case.all, read_weights=weights, plan=plan))


def test_a_gate_of_0_reads_one_slot():
    case = make_case("gated_deltanet")
    weights = torch.rand(2, 45, 2, 4, dtype=torch.float64)
    plan = dk.plan_memory(*case.keys, tau=0.9, capacity=4)
    off = torch.where(plan.boundary & (plan.positions > 0)[..., None], 0.0, 1.0)
    merged = dk.dla_attention(*case.all, read_weights=weights, plan=plan, gates=off)
    newest = weights[..., :1].expand_as(weights)
    assert_close("o", merged, dk.dla_attention(*case.all, read_weights=newest, plan=plan))


def test_soft_gates_follow_the_recursion_of_the_text():
    """w_0 = lambda_0, w_r = p_r lambda_r + (1 - p_r) w_(r-1), slot by slot from slot_starts."""
    case = make_case("mamba2", batch=1, heads=1)
    weights = torch.rand(1, 45, 1, 4, dtype=torch.float64)
    plan, gates, o = soft_layer(case, weights, 1.0, 0.3)
    starts = plan.slot_starts()[0, :, 0]
    expected = weights.clone()
    for t in range(45):
        live = starts[t][starts[t] >= 0].flip(0)
        for r in range(1, len(live)):
            p = gates[0, live[r - 1], 0].double()
            expected[0, t, 0, r] = p * weights[0, t, 0, r] + (1 - p) * expected[0, t, 0, r - 1]
    assert (gates < 0.9).any()
    assert_close("o", o, dk.dla_attention(*case.all, read_weights=expected, plan=plan))


def test_gates_pass_through_a_carried_cache():
    case = make_case("gated_deltanet")
    weights = torch.rand(2, 45, 2, 4, dtype=torch.float64)
    plan, gates, whole = soft_layer(case, weights, 1.0, 0.3)
    first = dk.plan_memory(*case.tokens(0, 20).keys, tau=0.9, capacity=4)
    a, cache = dk.dla_attention(
        *case.tokens(0, 20).all, read_weights=weights[:, :20], plan=first, gates=gates[:, :20], return_cache=True
    )
    second = dk.plan_memory(*case.tokens(20, 45).keys, tau=0.9, capacity=4, cache=cache)
    b = dk.dla_attention(
        *case.tokens(20, 45).all, read_weights=weights[:, 20:], plan=second, gates=gates[:, 20:], cache=cache
    )
    assert_close("o", torch.cat([a, b], 1), whole)


def test_tau_keys_and_values_get_gradients_through_soft_gates():
    case = make_case("gated_deltanet").map(lambda x: x.clone().requires_grad_())
    weights = torch.rand(2, 45, 2, 4, dtype=torch.float64)
    tau = torch.tensor([0.9, 1.0], requires_grad=True)
    _, _, o = soft_layer(case, weights, tau, 0.3)
    o.square().sum().backward()
    assert tau.grad.abs().min() > 1e-4


def test_straight_through_gates_have_hard_values_and_soft_gradients():
    case = make_case("gated_deltanet")
    weights = torch.rand(2, 45, 2, 4, dtype=torch.float64)
    tau = torch.tensor([0.9, 1.0], requires_grad=True)
    plan, gates, o = soft_layer(case, weights, tau, 0.3, gate="straight_through")
    assert torch.equal(gates, torch.ones_like(gates))
    assert_close("o", o, dk.dla_attention(*case.all, read_weights=weights, plan=plan))
    o.square().sum().backward()
    assert tau.grad.abs().min() > 1e-4


def test_gate_options_are_checked():
    case = make_case("mamba2")
    plan = dk.plan_memory(*case.keys, tau=0.9, capacity=4)
    with pytest.raises(ValueError, match="temperature=0"):
        dk.boundary_gate(plan.score, plan, tau=0.6, temperature=0)
    with pytest.raises(ValueError, match="gate='hard'"):
        dk.boundary_gate(plan.score, plan, tau=0.6, temperature=0.1, gate="hard")


def test_content_weights_are_a_softmax_over_live_slots_and_a_null_slot():
    affinity = torch.tensor([[0.5, -0.2, float("-inf")], [1.0, float("-inf"), float("-inf")]])[None]
    slot = torch.ones(1, 2, 3)
    gain, sharpness = torch.tensor([2.0, 0.5]), torch.tensor([4.0, 8.0])
    weights = dk.content_read_weights(slot, affinity, gain=gain, sharpness=sharpness)
    e = torch.tensor([2.0, -0.8, 0.0]).exp()
    assert torch.allclose(weights[0, 0], 1 + 2.0 * torch.tensor([e[0], e[1], 0.0]) / e.sum())
    assert weights[0, 1, 1] == 1 and weights[0, 1, 0] < 1.5


def test_a_gain_of_0_is_the_slot_form_exactly_and_still_learns():
    affinity = torch.randn(2, 5, 3, 4)
    gain = torch.zeros(3, requires_grad=True)
    weights = dk.content_read_weights(torch.ones(2, 5, 3, 4), affinity, gain=gain, sharpness=torch.full((3,), 8.0))
    assert torch.equal(weights, torch.ones_like(weights))
    weights.sum().backward()
    assert gain.grad.abs().min() > 0
