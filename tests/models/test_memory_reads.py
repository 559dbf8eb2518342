"""Read weights, gains and thresholds: exact at the start, bounded always, and each level's weight on its own tokens."""

import pytest
import torch
import torch.nn.functional as F

from dla_train.models.backbone import StateInputs
from dla_train.models.memory_reads import MemoryReader, Tau
from dla_train.parallel.axes import Axis


def reader_of(configs, dtype=torch.float32):
    reader = MemoryReader(*configs, Axis.single()).to(dtype)
    with torch.no_grad():
        for tensor in (*reader.parameters(), *reader.buffers()):
            tensor.zero_()
    return reader


def inputs_of(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, tokens, 2, 4, generator=generator).unbind(0)
    v = torch.randn(1, tokens, 4, 6, generator=generator)
    return StateInputs(q, k, v, -torch.rand(1, tokens, 4, generator=generator), None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["log_linear", "fixed", "dla"])
def test_fresh_slot_weights_are_exactly_one_in_float32(tiny, policy, dtype):
    reader = reader_of(tiny("mamba2", policy, read="slot"))
    weights = reader.slot_weights(torch.randn(2, 9, 12, dtype=dtype), torch.arange(9).expand(2, 9))
    assert weights.shape == (2, 9, 4, reader.capacity) and weights.dtype == torch.float32
    assert weights.unique().tolist() == [1.0]


def test_log_linear_weighs_every_token_by_its_fenwick_level(tiny):
    """Level of s at t is the bit length of t xor s, clamped to the last trained one (arXiv 2506.04761)."""
    from dla_kernels import plan_memory

    tokens, levels = 40, 5
    reader = reader_of(tiny("mamba2", "log_linear", levels=levels))
    reader.slots.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    x, hidden = inputs_of(tokens), torch.randn(1, tokens, 12)
    plan = plan_memory(x.k, x.v, x.log_decay, tau=0.6, capacity=8, policy="log_linear")
    by_rank, by_level = reader.slot_weights(hidden, plan.positions), reader.slots(hidden)
    starts = plan.slot_starts()
    for t in range(tokens):
        for s in range(t + 1):
            live = starts[0, t, 0][starts[0, t, 0] >= 0]
            rank = int((live > s).sum())
            level = min((t ^ s).bit_length(), levels - 1)
            assert torch.equal(by_rank[0, t, :, rank], by_level[0, t, :, level]), (t, s)


@pytest.mark.parametrize("policy", ["log_linear", "fixed", "dla"])
def test_content_alone_is_content_whose_slot_weights_stay_at_one(tiny, policy):
    from dla_kernels import plan_memory

    both, alone = (reader_of(tiny("mamba2", policy, read=read)) for read in ("content", "content_only"))
    x, hidden = inputs_of(12), torch.randn(1, 12, 12)
    plan = plan_memory(x.k, x.v, x.log_decay, tau=0.6, capacity=both.capacity, policy=policy)
    for reader in (both, alone):
        for name, parameter in reader.routing.named_parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name))).abs_()
    (expected, _), (weights, _) = (reader(hidden, x, plan, None) for reader in (both, alone))
    assert alone.slots is None and weights.max() > 1
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_a_gain_of_zero_reads_exactly_the_slot_form_and_a_negative_one_is_zero(tiny):
    from dla_kernels import plan_memory

    reader = reader_of(tiny("mamba2", "dla"))
    x, hidden = inputs_of(12), torch.randn(1, 12, 12)
    plan = plan_memory(x.k, x.v, x.log_decay, tau=0.6, capacity=4)
    reader.routing.gain.data = torch.tensor([0.0, -0.5, 0.25, 0.0])
    weights, terms = reader(hidden, x, plan, None)
    assert terms.gain.tolist() == [0.0, 0.0, 0.25, 0.0]
    assert weights[:, :, [0, 1, 3]].unique().tolist() == [1.0]
    assert (weights >= 1).all() and (weights[:, :, 2, 0] > 1).all()
    weights.sum().backward()
    assert (reader.routing.gain.grad > 0).all()


@pytest.mark.parametrize("routing", ["qk", "projected", "convolved"])
def test_routing_terms_have_unit_length(tiny, routing):
    reader = reader_of(tiny("mamba2", "dla", routing=routing, routing_dim=3))
    for parameter in reader.routing.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    terms = reader.routing(torch.randn(1, 9, 12), inputs_of(9), torch.arange(9)[None], None)
    for vector in (terms.rho, terms.kappa):
        assert vector.shape == (1, 9, 2, 4 if routing == "qk" else 3)
        torch.testing.assert_close(vector.norm(dim=-1), torch.ones(1, 9, 2))


def test_routing_keys_are_a_signed_mean_of_the_last_tokens_of_their_document(tiny):
    reader = reader_of(tiny("mamba2", "dla", routing="convolved", routing_dim=3))
    for parameter in reader.routing.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    hidden, begin = torch.randn(1, 9, 12), 4
    positions = torch.cat([torch.arange(begin), torch.arange(9 - begin)])[None]
    terms = reader.routing(hidden, inputs_of(9), positions, None)
    for projection, found in (("rho", terms.rho), ("kappa", terms.kappa)):
        x = getattr(reader.routing, projection)(hidden)[0]
        taps = getattr(reader.routing.conv, projection)
        rows = [
            sum(taps[:, -1 - back] * x[t - back] for back in range(taps.shape[1]) if back <= positions[0, t])
            for t in range(9)
        ]
        torch.testing.assert_close(found[0], F.normalize(torch.stack(rows).view(9, 2, 3), dim=-1))


def test_a_learned_tau_stays_inside_its_bounds_whatever_its_parameter():
    tau = Tau(3, "learned")
    tau.theta.data = torch.tensor([-1e6, 0.0, 1e6])
    torch.testing.assert_close(tau(), torch.tensor([0.1, 0.7, 1.3]))
