"""Every backbone with every policy: documents are separate, time is causal, a fresh memory is its backbone."""

import dataclasses

import pytest
import torch

from dla_train.models import LanguageModel, next_token_loss

RECURRENT = [(b, p) for b in ("mamba2", "gated_deltanet") for p in ("single", "log_linear", "fixed", "dla")]
KINDS = [*RECURRENT, ("attention", "none")]
VARIANTS = [
    {"closed_slots": "frozen"},
    {"drift": "update"},
    {"capacity_rule": "oldest"},
    {"capacity_rule": "random"},
    {"routing": "qk"},
    {"routing": "projected"},
    {"read": "slot"},
    {"gate": "straight_through"},
    {"tau_control": "rate"},
    {"num_key_heads": 1},
    {"num_key_heads": 4},
    {"conv_width": 0},
    {"conv_width": 1},
    {"conv_bias": True},
    {"mlp_width": 0},
    {"tie_embeddings": True},
    {"backend": "recurrent"},
    {"chunk_tokens": 16},
]
CASES = [(b, p, {}) for b, p in KINDS] + [(b, "dla", v) for b in ("mamba2", "gated_deltanet") for v in VARIANTS]


def tokens_of(*shape, seed=0):
    return torch.randint(0, 17, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("backbone", "policy", "changes"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_packed_documents_equal_separate_ones(tiny, build, backbone, policy, changes, training):
    lm = build(*tiny(backbone, policy, **changes)).train(training)
    tokens, lengths = tokens_of(2, 19), [5, 1, 13, 2, 17]
    packed = lm(tokens, torch.tensor([0, *torch.tensor(lengths).cumsum(0)])).logits.flatten(0, 1)
    for piece, logits in zip(tokens.flatten().split(lengths), packed.split(lengths), strict=True):
        torch.testing.assert_close(lm(piece[None]).logits[0], logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("backbone", "policy", "changes"), CASES)
def test_last_token_of_a_document_leaves_every_other_bitwise_unchanged(tiny, build, backbone, policy, changes):
    lm = build(*tiny(backbone, policy, **changes), dtype=torch.float32).train()
    tokens, offsets = tokens_of(2, 12), torch.tensor([0, 5, 12, 21, 24])
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 17
    before, after = (lm(t, offsets).logits for t in (tokens, changed))
    assert not torch.equal(before[0, 4], after[0, 4])
    assert torch.equal(before[0, :4], after[0, :4])
    assert torch.equal(before[0, 5:], after[0, 5:])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize(("backbone", "policy"), KINDS)
def test_no_token_sees_a_later_one(tiny, build, backbone, policy):
    lm = build(*tiny(backbone, policy)).train()
    tokens = tokens_of(1, 21)
    changed = tokens.clone()
    changed[0, 13:] = (changed[0, 13:] + 3) % 17
    torch.testing.assert_close(lm(tokens).logits[:, :13], lm(changed).logits[:, :13], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("policy", ["log_linear", "fixed", "dla"])
@pytest.mark.parametrize("backbone", ["mamba2", "gated_deltanet"])
@pytest.mark.parametrize("gate", ["soft", "hard", "straight_through"])
def test_fresh_memory_of_every_policy_is_its_single_state_backbone(tiny, build, backbone, policy, gate):
    """Same seed, same names: the shared parameters start equal, read weights at 1, gains at 0."""
    multi = build(*tiny(backbone, policy, gate=gate), scatter=False).train()
    single = build(*tiny(backbone, "single"), scatter=False).train()
    tokens, offsets = tokens_of(2, 33), torch.tensor([0, 7, 33, 66])
    # double precision, but parameters drawn in float32: weights are 1 to 5e-10
    torch.testing.assert_close(multi(tokens, offsets).logits, single(tokens, offsets).logits, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("backbone", "policy"), KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2), (2, 31)])
def test_any_length_and_batch_runs_and_rows_are_independent(tiny, build, backbone, policy, shape):
    lm = build(*tiny(backbone, policy)).eval()
    tokens = tokens_of(*shape)
    logits = lm(tokens).logits
    assert logits.shape == (*shape, 17) and logits.isfinite().all()
    torch.testing.assert_close(logits[-1:], lm(tokens[-1:]).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("backbone", "policy", "changes"),
    [
        *((b, p, {}) for b, p in KINDS),
        *(
            (b, "dla", v)
            for b in ("mamba2", "gated_deltanet")
            for v in (
                {"tau_control": "learned"},
                {"tau_control": "learned", "gate": "straight_through"},
                {"routing": "qk"},
                {"closed_slots": "frozen"},
                {"drift": "update"},
                {"read": "slot"},
                {"read": "content_only"},
            )
        ),
    ],
)
def test_a_gradient_reaches_every_parameter(tiny, build, backbone, policy, changes):
    lm = build(*tiny(backbone, policy, **changes)).train()
    logits = lm(tokens_of(2, 40)).logits
    next_token_loss(logits, tokens_of(2, 40, seed=1))[0].backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("backbone", ["mamba2", "gated_deltanet"])
def test_a_content_gain_of_zero_learns(tiny, build, backbone):
    lm = build(*tiny(backbone, "dla"), scatter=False).train()
    next_token_loss(lm(tokens_of(2, 40)).logits, tokens_of(2, 40, seed=1))[0].backward()
    for block in lm.blocks:
        assert block.mixer.reader.routing.gain.unique().tolist() == [0.0]
        assert (block.mixer.reader.routing.gain.grad != 0).all()


@pytest.mark.parametrize("changes", [{}, {"tau_control": "learned"}, {"closed_slots": "frozen"}])
@pytest.mark.parametrize("backbone", ["mamba2", "gated_deltanet"])
def test_recompute_gives_the_same_gradients_and_decides_once(tiny, build, monkeypatch, backbone, changes):
    from dla_train.models import recurrent

    calls, plan_memory = [], recurrent.plan_memory

    def counted(*args, **kwargs):
        calls.append(1)
        return plan_memory(*args, **kwargs)

    monkeypatch.setattr(recurrent, "plan_memory", counted)
    tokens, offsets, results = tokens_of(2, 24), torch.tensor([0, 9, 24, 48]), []
    for recompute in (False, True):
        lm = build(*tiny(backbone, "dla", **changes), dtype=torch.float32, recompute=recompute).train()
        calls.clear()
        next_token_loss(lm(tokens, offsets).logits, tokens)[0].backward()
        assert len(calls) == len(lm.blocks)
        results.append({"statistics": lm.memory_statistics(), **{n: p.grad for n, p in lm.named_parameters()}})
    for name, kept in results[0].items():
        assert torch.equal(kept, results[1][name]), name


def test_recompute_really_drops_activations(tiny, build):
    saved = []
    for recompute in (False, True):
        lm = build(*tiny("attention", "none"), dtype=torch.float32, recompute=recompute).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            lm(tokens_of(2, 24))
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 2


def test_statistics_count_what_the_plans_hold(tiny, build):
    lm = build(*tiny("gated_deltanet", "dla")).eval()
    plans = []
    lm(tokens_of(2, 24), torch.tensor([0, 9, 24, 48]), observe=lambda layer, reading: plans.append(reading.plan))
    counted = lm.memory_statistics()
    assert counted.shape == (2, 4, 3)
    for layer, plan in zip(counted, plans, strict=True):
        # three documents, whose starts are no decision and open one slot each
        assert layer[:, 0].tolist() == (plan.boundary.sum((0, 1)) - 3).tolist()
        assert layer[:, 1].tolist() == [45] * 4
        assert layer[:, 2].tolist() == ((plan.slot_starts() >= 0).sum((0, 1, 3)) - 3).tolist()
    lm(tokens_of(1, 8))
    assert lm.memory_statistics()[:, :, 1].unique().tolist() == [52]
    lm.reset_memory_statistics()
    assert lm.memory_statistics().count_nonzero() == 0


def test_attention_has_no_statistics_and_shows_nothing(tiny, build):
    lm = build(*tiny("attention", "none"))
    seen = []
    lm(tokens_of(1, 8), observe=lambda layer, reading: seen.append(layer))
    assert seen == []
    assert lm.memory_statistics().count_nonzero() == 0 and lm.memory_statistics().shape == (2, 4, 3)


def test_controlled_tau_follows_the_rate_and_stays_in_bounds(tiny, build):
    lm = build(*tiny("mamba2", "dla", tau_control="rate", target_boundary_rate=0.25, tau_step=0.125), scatter=False)
    tau = lm.blocks[1].mixer.reader.tau
    statistics = torch.zeros(2, 4, 3, dtype=torch.float64)
    statistics[1] = torch.tensor([[50, 100, 0], [10, 100, 0], [25, 100, 0], [0, 0, 0]])
    lm.control_tau(statistics)
    torch.testing.assert_close(tau(), torch.tensor([0.725, 0.475, 0.6, 0.6], dtype=torch.float64))
    for _ in range(20):
        lm.control_tau(statistics)
    torch.testing.assert_close(tau(), torch.tensor([1.98, 0.02, 0.6, 0.6], dtype=torch.float64))
    assert "blocks.1.mixer.reader.tau.value" in lm.state_dict()


@pytest.mark.parametrize("control", ["fixed", "learned"])
def test_only_rate_control_moves_tau(tiny, build, control):
    lm = build(*tiny("mamba2", "dla", tau_control=control), scatter=False)
    lm.control_tau(torch.ones(2, 4, 3, dtype=torch.float64))
    torch.testing.assert_close(lm.blocks[0].mixer.reader.tau(), torch.full((4,), 0.6, dtype=torch.float64))


def test_a_higher_tau_opens_fewer_slots(tiny, build):
    rates = []
    for tau in (0.1, 0.9, 1.3):
        lm = build(*tiny("gated_deltanet", "dla", tau=tau))
        lm(tokens_of(2, 30))
        rates.append(lm.memory_statistics()[..., 0].sum().item())
    assert rates[0] > rates[1] > rates[2] > 0


@pytest.mark.parametrize("policy", ["fixed", "dla"])
def test_gate_temperature_matters_in_training_of_dynamic_boundaries_only(tiny, build, policy):
    lm, tokens = build(*tiny("gated_deltanet", policy)), tokens_of(1, 30)
    assert torch.equal(lm.eval()(tokens, gate_temperature=1.0).logits, lm(tokens, gate_temperature=0.01).logits)
    warm, cold = (lm.train()(tokens, gate_temperature=t).logits for t in (1.0, 1e-4))
    assert torch.equal(warm, cold) == (policy == "fixed")
    torch.testing.assert_close(cold, lm.eval()(tokens).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("backbone", "policy"), KINDS)
def test_bfloat16_activations_stay_near_float32_and_parameters_stay_float32(tiny, build, backbone, policy):
    configs, tokens = tiny(backbone, policy, gate="hard"), tokens_of(2, 20)
    exact, rounded = (build(*configs, dtype=d, scatter=False) for d in (torch.float32, torch.bfloat16))
    out = rounded(tokens, return_caches=True)
    assert out.logits.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in rounded.parameters())
    if policy != "none":
        assert {c.states.dtype for c in out.caches} == {torch.float32}
    reference = exact(tokens).logits
    assert (out.logits.float() - reference).abs().max() < 0.1 * reference.abs().max()
    next_token_loss(out.logits, tokens)[0].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in rounded.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_some_positions_are_those_of_all_with_the_same_gradients(tiny, build, tied):
    lm = build(*tiny("gated_deltanet", "dla", tie_embeddings=tied)).train()
    tokens, positions = tokens_of(3, 11), torch.tensor([32, 0, 5, 11, 12])
    found, wanted = lm(tokens, positions=positions).logits, lm(tokens).logits.flatten(0, 1)[positions]
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(logits.square().sum(), list(lm.parameters())) for logits in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_wrong_inputs_are_refused_by_name(tiny, build):
    lm = build(*tiny("mamba2", "dla"))
    with pytest.raises(ValueError, match=r"\[B, T\] int64"):
        lm(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="row edge"):
        lm(tokens_of(2, 8), torch.tensor([0, 5, 16]))
    with pytest.raises(ValueError, match="rise strictly"):
        lm(tokens_of(2, 8), torch.tensor([0, 8, 8, 16]))
    lm.axes = dataclasses.replace(lm.axes, sequence=True)
    with pytest.raises(ValueError, match=r"whole rows on every rank: parallel\.sequence=false"):
        lm(tokens_of(2, 8), positions=torch.tensor([7]))


def test_an_unknown_backbone_is_a_configuration_error(tiny):
    from dla_train.config import ConfigError

    model, memory = tiny("mamba2", "dla")
    with pytest.raises(ConfigError, match=r"model\.backbone=mamba3"):
        LanguageModel(dataclasses.replace(model, backbone="mamba3"), memory)
