"""Prompt by chunks and then token by token equals the whole sequence, for every backbone and policy, in float32."""

import pytest
import torch

from dla_train.generate import prefill

RECURRENT = [(b, p) for b in ("mamba2", "gated_deltanet") for p in ("single", "log_linear", "fixed", "dla")]
CASES = [
    *((b, p, {}) for b, p in [*RECURRENT, ("attention", "none")]),
    *(
        (b, "dla", v)
        for b in ("mamba2", "gated_deltanet")
        for v in (
            {"closed_slots": "frozen"},
            {"drift": "update"},
            {"capacity_rule": "oldest"},
            {"capacity_rule": "random"},
            {"read": "slot"},
            {"read": "content_only"},
            {"routing": "qk"},
            {"conv_width": 0},
            {"conv_width": 1},
            {"conv_bias": True},
            {"num_key_heads": 1},
        )
    ),
    ("gated_deltanet", "log_linear", {"read": "content"}),
    ("mamba2", "fixed", {"read": "slot"}),
]
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-3)]


def tokens_of(*shape, seed=0):
    return torch.randint(0, 17, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("backbone", "policy", "changes"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@torch.no_grad()
def test_prefill_and_decode_equal_the_full_forward(tiny, build, backbone, policy, changes, dtype, tolerance):
    lm, tokens = build(*tiny(backbone, policy, **changes), dtype=dtype).eval(), tokens_of(2, 26)
    whole = lm(tokens).logits
    caches = lm.empty_caches(2, 26)
    logits, caches = prefill(lm, tokens[:, :15], caches, chunk_tokens=7)
    torch.testing.assert_close(logits, whole[:, 14], rtol=tolerance, atol=tolerance)
    held = sum(cache.nbytes for cache in caches)
    for t in range(15, 26):
        torch.testing.assert_close(lm.step(tokens[:, t], caches), whole[:, t], rtol=tolerance, atol=tolerance)
    assert sum(cache.nbytes for cache in caches) == held


@pytest.mark.parametrize(("backbone", "policy"), [*RECURRENT, ("attention", "none")])
@torch.no_grad()
def test_decoding_from_the_first_token_equals_the_full_forward(tiny, build, backbone, policy):
    lm, tokens = build(*tiny(backbone, policy)).eval(), tokens_of(3, 12)
    caches = lm.empty_caches(3, 12)
    stepped = torch.stack([lm.step(tokens[:, t], caches) for t in range(12)], dim=1)
    torch.testing.assert_close(stepped, lm(tokens).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("backbone", "policy"), [*RECURRENT, ("attention", "none")])
@torch.no_grad()
def test_a_cache_continues_the_last_document_and_packed_rows_may_follow(tiny, build, backbone, policy):
    """Rows hold several documents before and after the split; the second call's first document continues the cache."""
    lm, tokens = build(*tiny(backbone, policy)).eval(), tokens_of(2, 20)
    whole = lm(tokens, torch.tensor([0, 6, 14, 20, 23, 40])).logits
    first, second = tokens[:, :9], tokens[:, 9:]
    out = lm(first, torch.tensor([0, 6, 9, 12, 18]), caches=lm.empty_caches(2, 20), return_caches=True)
    rest = lm(second, torch.tensor([0, 5, 11, 22]), caches=out.caches).logits
    torch.testing.assert_close(torch.cat([out.logits, rest], dim=1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("backbone", "policy"), [("gated_deltanet", "dla"), ("attention", "none")])
@torch.no_grad()
def test_no_cache_and_an_empty_cache_are_the_same(tiny, build, backbone, policy):
    lm, tokens = build(*tiny(backbone, policy)).eval(), tokens_of(2, 9)
    fresh, given = lm(tokens, return_caches=True), lm(tokens, caches=lm.empty_caches(2, 9), return_caches=True)
    torch.testing.assert_close(fresh.logits, given.logits)
    for a, b in zip(fresh.caches, given.caches, strict=True):
        for name, value in vars(a).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, getattr(b, name), msg=name)
