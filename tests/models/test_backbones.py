"""Each single-state mixer equals its published recurrence, written out token by token and head by head."""

import pytest
import torch
import torch.nn.functional as F

from dla_train.models.block import build_mixer
from dla_train.models.mixer import Documents, PlanRecord
from dla_train.parallel.axes import Axes


def convolved(x, weight):
    """Causal depthwise convolution by torch's own, then SiLU: x [T, C], weight [C, W]."""
    padded = F.pad(x.T[None], (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], groups=weight.shape[0])[0].T)


def normed(x, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def mamba2_by_the_book(m, x, heads, groups):
    inner, b, c = (convolved(p(x), w) for p, w in ((m.x, m.conv.x), (m.B, m.conv.B), (m.C, m.conv.C)))
    dt = F.softplus(m.dt(x) + m.decay.dt_bias)
    inner, b, c = inner.unflatten(-1, (heads, -1)), b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))
    y = torch.zeros_like(inner)
    for h in range(heads):
        state, g = x.new_zeros(b.shape[-1], inner.shape[-1]), h // (heads // groups)
        for t in range(len(x)):
            state = torch.exp(-m.decay.A_log[h].exp() * dt[t, h]) * state + dt[t, h] * torch.outer(b[t, g], inner[t, h])
            y[t, h] = c[t, g] @ state + m.norm.D[h] * inner[t, h]
    gated = (y.flatten(-2) * F.silu(m.z(x))).unflatten(-1, (groups, -1))
    return m.out(normed(gated).flatten(-2) * m.norm.weight)


def gated_deltanet_by_the_book(m, x, heads, groups):
    q, k, v = (convolved(p(x), w) for p, w in ((m.q, m.conv.q), (m.k, m.conv.k), (m.v, m.conv.v)))
    q, k = (F.normalize(y.unflatten(-1, (groups, -1)), dim=-1) for y in (q, k))
    v, beta = v.unflatten(-1, (heads, -1)), m.b(x).sigmoid()
    decay = torch.exp(-m.decay.A_log.exp() * F.softplus(m.a(x) + m.decay.dt_bias))
    y = torch.zeros_like(v)
    for h in range(heads):
        state, g = x.new_zeros(q.shape[-1], v.shape[-1]), h // (heads // groups)
        for t in range(len(x)):
            state = decay[t, h] * state
            state = state + beta[t, h] * torch.outer(k[t, g], v[t, h] - state.T @ k[t, g])
            y[t, h] = q[t, g] @ state * q.shape[-1] ** -0.5
    gate = m.gate(x).unflatten(-1, (heads, -1))
    return m.out((normed(y) * m.norm.weight * F.silu(gate)).flatten(-2))


BY_THE_BOOK = {"mamba2": mamba2_by_the_book, "gated_deltanet": gated_deltanet_by_the_book}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("backbone", ["mamba2", "gated_deltanet"])
@torch.no_grad()
def test_single_state_mixer_equals_the_published_recurrence(tiny, backbone, groups):
    mixer = build_mixer(
        *tiny(backbone, "single", num_key_heads=groups), Axes.single(), compute_dtype=torch.float64
    ).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        parameter.normal_(0, 0.7, generator=generator)
    x = torch.randn(1, 21, 12, dtype=torch.float64, generator=generator)
    mixed, _ = mixer(x, Documents.of(1, 21, None), PlanRecord(), gate_temperature=1.0)
    torch.testing.assert_close(mixed[0], BY_THE_BOOK[backbone](mixer.backbone, x[0], 4, groups))


@pytest.mark.parametrize("drift", ["token", "update"])
@torch.no_grad()
def test_keys_short_of_unit_length_are_planned_and_mixed_as_by_the_token_loop(tiny, build, drift):
    tokens = torch.randint(0, 17, (2, 21), generator=torch.Generator().manual_seed(0))
    logits = []
    for backend in ("torch", "recurrent"):
        model, memory = tiny("gated_deltanet", "dla", qk_norm_eps=2.0, drift=drift, backend=backend, chunk_tokens=16)
        lm = build(model, memory)
        logits.append(lm(tokens).logits)
        assert lm.blocks[0].mixer.backbone.norm_eps == 2.0
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_mamba2_norm_does_not_mix_groups(tiny, build):
    """What makes a split of heads over ranks exact: one group's output norm ignores every other group."""
    lm = build(*tiny("mamba2", "single", num_key_heads=2))
    norm = lm.blocks[0].mixer.backbone.norm
    read, skip = torch.randn(2, 1, 5, 4, 6, dtype=torch.float64).unbind(0)
    gate = torch.randn(1, 5, 24, dtype=torch.float64)
    changed = read.clone()
    changed[:, :, 2:] += 1
    assert torch.equal(norm(read, skip, gate)[..., :12], norm(changed, skip, gate)[..., :12])
    assert not torch.equal(norm(read, skip, gate)[..., 12:], norm(changed, skip, gate)[..., 12:])
