"""The Triton short convolution and norms against the torch ones in float64: outputs and every gradient by name."""

from collections.abc import Callable

import pytest
import torch
from tolerances import RMS_FLOAT32, RMS_HALF, assert_rms_close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dla_kernels as dk
from dla_kernels import conv1d, conv1d_triton, launch, norm, norm_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: (RMS_FLOAT32, RMS_FLOAT32), torch.float16: (RMS_HALF["o"], RMS_HALF["dv"])}
NAN = float("nan")


class PoisonedTorch:
    """torch, but new memory is NaN: what a kernel leaves unwritten, or reads before it was written, shows."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def empty(self, *size: int, **options) -> Tensor:
        return torch.full(size, NAN, **options)

    def empty_like(self, x: Tensor, **options) -> Tensor:
        return torch.full_like(x, NAN, **options)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    for module in (conv1d_triton, norm_triton):
        monkeypatch.setattr(module, "torch", PoisonedTorch())


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def assert_same(operation: Callable[..., Tensor], inputs: dict[str, Tensor | None], dtype: torch.dtype, **options):
    """`operation` in Triton at `dtype` equals itself in torch at float64, in value and in every gradient."""
    low = {name: None if x is None else x.to(dtype).requires_grad_() for name, x in inputs.items()}
    high = {name: None if x is None else x.detach().double().requires_grad_() for name, x in low.items()}
    actual = operation(**low, **options, backend="triton")
    expected = operation(**high, **options, backend="torch")
    assert actual.dtype == dtype and actual.is_contiguous()
    upstream = normal(*expected.shape, seed=9)
    grads = torch.autograd.grad(actual, [x for x in low.values() if x is not None], upstream.to(dtype))
    wanted = torch.autograd.grad(expected, [x for x in high.values() if x is not None], upstream.to(dtype).double())
    assert_rms_close("value", actual, expected, LIMITS[dtype][0])
    names = [name for name, x in inputs.items() if x is not None]
    for name, grad, want in zip(names, grads, wanted, strict=True):
        assert grad.dtype == dtype
        assert_rms_close(f"d{name}", grad, want, LIMITS[dtype][1])


def packed(batch: int, tokens: int, lengths: list[int], before: int = 0) -> Tensor:
    """[B, T] positions of documents of `lengths`, the last one filling the row; the first has `before` tokens seen."""
    edges = torch.tensor([0, *lengths]).cumsum(0)
    start = torch.zeros(tokens, dtype=torch.int64)
    start[edges[edges < tokens]] = edges[edges < tokens]
    start = start.cummax(0).values
    positions = torch.arange(tokens) - start + before * (start == 0)
    return positions.expand(batch, tokens).to(DEVICE)


CONVOLUTIONS = {  # B, T, C, W, lengths of packed documents, history
    "one token": (2, 1, 5, 4, None, None),
    "shorter than the taps": (1, 3, 40, 8, None, 7),
    "documents": (2, 50, 20, 4, [1, 2, 4, 1, 9, 3], None),
    "documents after a history": (2, 70, 65, 4, [2, 3, 30], 2),
    "a long history": (1, 33, 16, 3, [40], 5),
    "more than a tile": (2, 140, 12, 2, [61, 3, 61], None),
}


@pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", [True, False])
def test_short_conv_and_its_gradients_equal_torch(shape, dtype, activation):
    batch, tokens, channels, width, lengths, before = shape
    inputs = {"x": normal(batch, tokens, channels), "weight": normal(channels, width)}
    inputs["history"] = None if before is None else normal(batch, channels, width - 1)
    positions = None if lengths is None else packed(batch, tokens, lengths, before or 0)
    assert_same(dk.short_conv, inputs, dtype, positions=positions, activation=activation)


def test_a_view_of_channels_is_read_where_it_lies_and_nothing_around_it():
    wide = torch.full((2, 30, 48), NAN, device=DEVICE)
    wide[..., 16:32] = normal(2, 30, 16).float()
    weight = normal(16, 4).float()
    for view in (wide[..., 16:32], wide.transpose(0, 1)[..., 16:32].transpose(0, 1), wide[:1, :, 16:32]):
        y = dk.short_conv(view, weight, backend="triton")
        assert_rms_close("y", y, dk.short_conv(view.double(), weight.double()), RMS_FLOAT32)
    with launch.recording(90) as launches:
        dk.short_conv(wide.to("meta")[..., 16:32], weight.to("meta"), backend="triton")
    assert launches[0].constants["ROW"] == 48, "no copy was made"


def test_a_history_whose_document_has_ended_gets_no_gradient():
    x, weight, history = normal(1, 9, 16).float(), normal(16, 4).float(), normal(1, 16, 3).float().requires_grad_()
    y = dk.short_conv(x, weight, positions=packed(1, 9, [4, 5]), history=history, backend="triton")
    y.sum().backward()
    assert (history.grad == 0).all()


def run_norm(
    x: Tensor, gate: Tensor | None = None, weight: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    if gate is None:
        return dk.rms_norm(x, weight, 1e-3, backend=backend)
    return dk.gated_rms_norm(x, gate, weight, 1e-3, backend=backend)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 24), (2, 7, 3, 16), (130, 40), (2, 600)], ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_and_their_gradients_equal_torch(shape, gated, weighted, dtype):
    inputs = {"x": normal(*shape)}
    inputs["gate"] = normal(*shape, seed=1) if gated else None
    inputs["weight"] = normal(shape[-1], seed=2) if weighted else None
    assert_same(run_norm, inputs, dtype)


def test_stretches_of_rows_add_up_to_the_gradient_of_the_weight():
    tuned = launch.tuning("rms_norm_backward", torch.device("cpu")) | {"BLOCK": 64, "PARTS": 3}
    with launch.override_tuning(rms_norm_backward=tuned):
        assert_same(
            run_norm, {"x": normal(23, 16), "gate": normal(23, 16, seed=1), "weight": normal(16)}, torch.float32
        )


def test_norms_of_zero_and_of_no_rows_are_finite():
    x, weight = torch.zeros(3, 16, device=DEVICE, requires_grad=True), torch.ones(16, device=DEVICE, requires_grad=True)
    y = dk.gated_rms_norm(x, torch.ones_like(x), weight, backend="triton")
    y.sum().backward()
    assert (y == 0).all() and x.grad.isfinite().all() and (weight.grad == 0).all()
    none = torch.zeros(0, 16, device=DEVICE, requires_grad=True)
    dk.rms_norm(none, weight, backend="triton").sum().backward()
    assert none.grad.shape == (0, 16) and (weight.grad == 0).all()


def test_a_gate_or_weight_of_another_type_keeps_it():
    x, gate = normal(4, 16).half().requires_grad_(), normal(4, 16).float().requires_grad_()
    weight = normal(16).float().requires_grad_()
    y = dk.gated_rms_norm(x, gate, weight, backend="triton")
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, gate.grad.dtype, weight.grad.dtype) == (torch.float16,) * 2 + (torch.float32,) * 2
    x, taps = normal(1, 5, 16).half().requires_grad_(), normal(16, 4).float().requires_grad_()
    dk.short_conv(x, taps, backend="triton").sum().backward()
    assert (x.grad.dtype, taps.grad.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dk.short_conv(torch.zeros(1, 2, 3), torch.zeros(4, 4), backend="triton"), "weight has 4 channels"),
        (
            lambda: dk.short_conv(
                torch.zeros(1, 5, 3), torch.zeros(3, 4), positions=torch.zeros(1, 4, dtype=int), backend="triton"
            ),
            "positions",
        ),
        (
            lambda: dk.short_conv(
                torch.zeros(1, 5, 3), torch.zeros(3, 4), history=torch.zeros(1, 3, 2), backend="triton"
            ),
            "history",
        ),
        (lambda: dk.rms_norm(torch.zeros(2, 4), torch.zeros(5), backend="triton"), "weight"),
        (lambda: dk.gated_rms_norm(torch.zeros(2, 4), torch.zeros(1, 4), backend="triton"), "gate"),
        (lambda: dk.rms_norm(torch.zeros(2, 4).double(), backend="triton"), "float64"),
    ],
)
def test_what_a_kernel_would_misread_is_refused(call, message):
    with torch.device(DEVICE), pytest.raises(ValueError, match=message):
        call()


def conv_and_norm(x: Tensor, weight: Tensor, gate: Tensor, scale: Tensor, positions: Tensor, backend: str) -> Tensor:
    mixed = dk.short_conv(x, weight, positions=positions, backend=backend)
    return dk.gated_rms_norm(mixed, gate, scale, backend=backend) + dk.rms_norm(mixed, None, backend=backend)


def leaves() -> list[Tensor]:
    shapes = ((1, 9, 16), (16, 4), (1, 9, 16), (16,))
    return [normal(*shape, seed=i).float().requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("wrapped", ["compiled", "checkpointed"])
def test_compiling_in_one_graph_and_checkpointing_change_no_gradient(backend, wrapped):
    positions = packed(1, 9, [2, 7])
    plain, again = leaves(), leaves()
    expected = conv_and_norm(*plain, positions, backend)
    if wrapped == "compiled":
        actual = torch.compile(conv_and_norm, fullgraph=True, backend="aot_eager")(*again, positions, backend)
    else:
        actual = checkpoint(conv_and_norm, *again, positions, backend, use_reentrant=False)
    upstream = normal(*expected.shape, seed=5).float()
    expected.backward(upstream)
    actual.backward(upstream)
    assert_rms_close("value", actual, expected, 1e-6)
    for name, a, b in zip(("x", "weight", "gate", "scale"), again, plain, strict=True):
        assert_rms_close(f"d{name}", a.grad, b.grad, 1e-6)


@pytest.mark.parametrize("optional", [True, False])
def test_the_custom_operations_are_well_formed(optional):
    x, weight, gate, scale = leaves()
    positions = packed(1, 9, [2, 7]).contiguous() if optional else None
    history = normal(1, 16, 3).float().requires_grad_() if optional else None
    torch.library.opcheck(conv1d._short_conv, (x, weight, positions, history, True))
    torch.library.opcheck(norm._gated_rms_norm, (x, gate if optional else None, scale if optional else None, 1e-5))
    dy = torch.ones_like(x)
    plain = [None if t is None else t.detach() for t in (x, weight, history, gate, scale)]
    torch.library.opcheck(conv1d._short_conv_backward, (dy, plain[0], plain[1], positions, plain[2], True))
    norm_inputs = (plain[3], plain[4]) if optional else (None, None)
    torch.library.opcheck(norm._gated_rms_norm_backward, (dy, plain[0], *norm_inputs, 1e-5))


def test_recorded_operations_collect_the_launches_of_forward_and_backward():
    x, weight, gate, scale = (t.detach().to("meta").requires_grad_() for t in leaves())
    with launch.recording(80) as launches:
        conv_and_norm(x, weight, gate, scale, packed(1, 9, [2, 7]).to("meta"), "triton").sum().backward()
    names = [launched.kernel.__name__.removesuffix("_kernel") for launched in launches]
    assert names[:3] == ["short_conv", "rms_norm", "rms_norm"]
    assert sorted(names[3:]) == ["rms_norm_backward", "rms_norm_backward", "short_conv_backward"]
