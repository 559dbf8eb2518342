"""What tests/rounding.py makes of the interpreter: the numbers that a GPU's conversions and products give."""

import pytest
import torch
from kernel_cases import BACKBONES, make_case
from tolerances import RMS_HALF, assert_rms_close

import dla_kernels as dk

triton = pytest.importorskip("triton", reason="needs Triton")

import triton.language as tl  # noqa: E402

from tests.rounding import rounding_as_a_gpu  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used where there is no GPU")


@triton.jit
def _copy(p_x, p_out):
    o_x = tl.arange(0, 64)
    tl.store(p_out + o_x, tl.load(p_x + o_x).to(p_out.dtype.element_ty))


@triton.jit
def _multiply(p_x, p_out, PRECISION: tl.constexpr):
    o_x = tl.arange(0, 16)
    b_x = tl.load(p_x + o_x[:, None] * 16 + o_x[None, :])
    tl.store(p_out + o_x[:, None] * 16 + o_x[None, :], tl.dot(b_x, b_x, input_precision=PRECISION))


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_conversions_to_bfloat16_are_those_of_torch(dtype):
    x, found = (10 * random(64)).to(dtype), torch.zeros(64, dtype=torch.bfloat16)
    if dtype == torch.float32:
        ties = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, float("inf"), -float("inf"), float("nan"), 0.0]
        x[:8] = torch.tensor(ties)
    with rounding_as_a_gpu():
        _copy[(1,)](x, found)
    assert torch.equal(found.nan_to_num(7), x.bfloat16().nan_to_num(7))


def test_products_in_bfloat16_are_exact_and_those_in_tf32_keep_10_bits():
    x, found = random(16, 16), torch.zeros(16, 16)
    with rounding_as_a_gpu():
        _multiply[(1,)](x.bfloat16(), found, "tf32")
        assert_rms_close("bfloat16", found, x.bfloat16().double() @ x.bfloat16().double(), 1e-6)
        _multiply[(1,)](x, found, "tf32")
        cut = (x.view(torch.int32) & -(2**13)).view(torch.float32).double()
        assert_rms_close("tf32", found, cut @ cut, 1e-6)
        for precision in ("ieee", "tf32x3"):
            _multiply[(1,)](x, found, precision)
            assert_rms_close(precision, found, x.double() @ x.double(), 1e-6)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("drift", ["token", "update"])
def test_a_plan_of_bfloat16_is_that_of_the_same_values_in_float32(backbone, drift):
    case = make_case(backbone, batch=1, key_dim=16, value_dim=16, dtype=torch.bfloat16)
    options = {"tau": {"token": 0.6, "update": 0.2}[drift], "capacity": 4, "drift": drift, "capacity_rule": "mass"}
    with rounding_as_a_gpu():
        plan = dk.plan_memory(*case.keys, **options, backend="triton", chunk_size=16)
    same = dk.plan_memory(*case.map(torch.Tensor.float).keys, **options, backend="torch")
    assert torch.equal(plan.boundary, same.boundary) and torch.equal(plan.merged, same.merged)
    assert (plan.merged >= 0).any()


def test_norms_and_convolutions_of_bfloat16_are_those_of_torch():
    x, gate = (random(2, 9, 20).bfloat16() for _ in range(2))
    weight = random(20, 4).bfloat16()
    with rounding_as_a_gpu():
        normed = dk.norm.gated_rms_norm(x, gate, weight[:, 0].contiguous(), backend="triton")
        mixed = dk.short_conv(x, weight, backend="triton")
    expected = dk.norm.gated_rms_norm(x.double(), gate.double(), weight[:, 0].double(), backend="torch")
    assert_rms_close("norm", normed, expected, RMS_HALF["o"])
    assert_rms_close("convolution", mixed, dk.short_conv(x.double(), weight.double(), backend="torch"), RMS_HALF["o"])
