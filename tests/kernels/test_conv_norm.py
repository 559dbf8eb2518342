"""Short convolution and norms."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

import dla_kernels as dk


def test_short_conv_is_a_causal_depthwise_convolution():
    x, weight = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    expected = F.conv1d(x.transpose(1, 2), weight[:, None], padding=3, groups=3)[..., :9].transpose(1, 2)
    assert_close("y", dk.short_conv(x, weight, activation=False), expected)
    assert_close("silu y", dk.short_conv(x, weight), F.silu(expected))


@pytest.mark.parametrize("lengths", [(9,), (1, 8), (2, 1, 6), (3, 4, 2)])
def test_packed_documents_convolve_as_if_alone_even_when_shorter_than_the_taps(lengths):
    x, weight = torch.randn(1, 9, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    positions = dk.document_positions(offsets, 1, 9)
    packed = dk.short_conv(x, weight, positions=positions)
    for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        assert_close("y", packed[:, a:b], dk.short_conv(x[:, a:b], weight))


@pytest.mark.parametrize("split", [1, 2, 5, 8])
def test_a_carried_window_continues_the_convolution(split):
    x, weight = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    whole = dk.short_conv(x, weight)
    window = dk.conv_window(x[:, :1], 4)
    for t in range(1, split):
        window = dk.conv_window(x[:, t : t + 1], 4, history=window)
    positions = torch.arange(split, 9).expand(2, -1)
    rest = dk.short_conv(x[:, split:], weight, positions=positions, history=window)
    assert_close("y", rest, whole[:, split:])


def test_short_conv_refuses_a_weight_of_other_channels():
    with pytest.raises(ValueError, match="weight has 4 channels, x has 3"):
        dk.short_conv(torch.zeros(1, 2, 3), torch.zeros(4, 4))


def test_norms_follow_their_formulas_and_survive_zero():
    x, gate, weight = torch.randn(5, 8), torch.randn(5, 8), torch.rand(8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert_close("rms_norm", dk.rms_norm(x, weight, 1e-5), expected)
    assert_close("gated", dk.gated_rms_norm(x, gate, weight, 1e-5), expected * gate * gate.sigmoid())
    zero = torch.zeros(2, 8, requires_grad=True)
    unit = dk.l2_normalize(zero)
    unit.sum().backward()
    assert (unit == 0).all() and zero.grad.isfinite().all()
    assert_close("norm", dk.l2_normalize(x).norm(dim=-1), torch.ones(5))


def test_norms_of_bfloat16_run_in_float32():
    x = torch.randn(4, 64).to(torch.bfloat16)
    assert dk.rms_norm(x).dtype == torch.bfloat16
    assert_close("rms_norm", dk.rms_norm(x).float(), dk.rms_norm(x.float()), torch.bfloat16)
