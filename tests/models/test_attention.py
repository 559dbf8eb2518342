"""Softmax attention: positions and masks by document, grouped heads, and a cache that equals the whole sequence."""

import pytest
import torch

from dla_train.models.attention import Attention, rotate
from dla_train.models.mixer import Documents, PlanRecord, attention_mask
from dla_train.parallel.axes import Axes


@pytest.fixture
def attention(tiny):
    model, _ = tiny("attention", "none")
    layer = Attention(model, Axes.single(), compute_dtype=torch.float64).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer


def run(layer, x, cu_seqlens=None):
    documents = Documents.of(x.shape[0], x.shape[1], cu_seqlens)
    return layer(x, documents, PlanRecord(), gate_temperature=1.0)[0]


def test_layer_equals_softmax_written_out_head_by_head(attention):
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    positions = torch.arange(7).expand(2, 7)
    q = rotate(attention.q(x).unflatten(-1, (4, 4)), positions, 500000.0)
    k = rotate(attention.k(x).unflatten(-1, (2, 4)), positions, 500000.0)
    v = attention.v(x).unflatten(-1, (2, 4))
    heads = []
    for head in range(4):
        scores = q[:, :, head] @ k[:, :, head // 2].transpose(1, 2) / 2
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, :, head // 2])
    torch.testing.assert_close(run(attention, x), attention.out(torch.cat(heads, dim=-1)))


def test_packed_documents_equal_separate_rows(attention):
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    packed = run(attention, x, torch.tensor([0, 2, 3, 9]))
    alone = torch.cat([run(attention, piece) for piece in x.split([2, 1, 6], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone)


def test_masked_path_equals_fused_causal_path(attention):
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    documents = Documents(torch.arange(5).expand(2, 5), None, False)
    masked = attention(x, documents, PlanRecord(), gate_temperature=1.0)[0]
    torch.testing.assert_close(masked, run(attention, x))


def test_document_mask_sees_own_document_only():
    mask = attention_mask(torch.tensor([[3, 0, 1]]), stored=3)
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]


def test_rotation_depends_on_relative_position_only():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind(0)

    def score(i, j):
        return (rotate(q, torch.tensor([[i]]), 1e4) * rotate(k, torch.tensor([[j]]), 1e4)).sum().item()

    assert score(7, 3) == pytest.approx(score(1004, 1000), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-4)


def test_overfull_cache_is_an_error(attention):
    cache = attention.empty_cache(1, 2)
    for _ in range(2):
        attention.step(torch.randn(1, 12, dtype=torch.float64), cache)
    with pytest.raises(ValueError, match="max_tokens=2"):
        attention.step(torch.randn(1, 12, dtype=torch.float64), cache)
