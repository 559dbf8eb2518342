"""Chunk operators in Triton kernels against their PyTorch form in float64, outputs and gradients by name."""

import pytest
import torch
from kernel_cases import BACKBONES, make_case
from tolerances import RMS_FLOAT32, RMS_HALF, assert_rms_close

from dla_kernels.backbones.operators import causal_decay, chunk_operators, document_cumsum, visible_tokens, write_matrix
from dla_kernels.inputs import heads_first, to_chunks

triton_modules = pytest.importorskip("triton", reason="kernels need Triton")

from dla_kernels.backbones.inverse_triton import write_matrix_triton  # noqa: E402
from dla_kernels.backbones.operators_triton import chunk_operators_triton  # noqa: E402


def document_starts(tokens, batch=2):
    """Two rows: documents that begin inside, at the edge of and alone in a chunk of 16; one carried from before."""
    starts = torch.zeros(batch, tokens, dtype=torch.int32)
    for row, edges in zip(starts, ([7, 16, 17, 40], [32, 35]), strict=False):
        for edge in edges:
            row[edge:] = edge
    starts[1][:32] = -3
    return starts


def boundaries(starts, heads, carried=True, seed=3):
    """Boundaries [B, T, H] at random, at every document start, and none for a while after the row's."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens = starts.shape
    drawn = torch.rand(batch, tokens, heads, generator=generator) < 0.2
    first = (starts == torch.arange(tokens, dtype=torch.int32))[:, :, None]
    return drawn | first


def chunks_of(x, heads, chunk, dtype=torch.float64):
    return to_chunks(heads_first(x, heads, dtype), chunk)


def expected_matrix(case, starts, chunk, boundary=None):
    heads = case.log_decay.shape[2]
    k, g, beta = (chunks_of(x, heads, chunk) for x in (case.k, case.log_decay, case.beta))
    sees = visible_tokens(starts.long(), chunk)
    matrix = write_matrix(k, document_cumsum(g, sees), beta, sees)
    if boundary is None:
        return matrix
    segment = to_chunks(boundary.transpose(1, 2), chunk).cumsum(-1)
    return matrix * (segment[..., :, None] == segment[..., None, :])


@pytest.mark.parametrize("chunk,tokens", [(16, 50), (32, 33), (64, 64), (128, 70)])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_write_matrix_equals_the_triangular_solve(chunk, tokens, frozen):
    case = make_case("gated_deltanet", tokens=tokens, key_heads=1, heads=2, key_dim=20, dtype=torch.float32)
    starts = document_starts(tokens)
    boundary = boundaries(starts, 2) if frozen else None
    actual = write_matrix_triton(case.k, case.log_decay, case.beta, starts, chunk, boundary=boundary)
    assert_rms_close("T", actual, expected_matrix(case, starts, chunk, boundary), RMS_FLOAT32)
    padding = -tokens % chunk
    assert not actual[:, :, -1, chunk - padding :].any() and not actual[:, :, -1, :, chunk - padding :].any()


def test_repeated_keys_at_full_strength_and_decays_of_exp_minus_20_are_inverted_exactly():
    case = make_case("gated_deltanet", dtype=torch.float32, tokens=128, key_dim=16, decay=20.0)
    case.k[:] = case.k[:, :1]
    case.beta[:] = 1.0
    case.log_decay[:, ::2] = 0.0
    case.log_decay[1] = 0.0
    starts = torch.zeros(2, 128, dtype=torch.int32)
    actual = write_matrix_triton(case.k, case.log_decay, case.beta, starts, 128)
    assert_rms_close("T", actual, expected_matrix(case, starts, 128), RMS_FLOAT32)


def test_a_chunk_size_the_kernels_are_not_built_for_is_refused():
    case = make_case("gated_deltanet", dtype=torch.float32)
    with pytest.raises(ValueError, match="chunk size 48"):
        write_matrix_triton(case.k, case.log_decay, case.beta, document_starts(45), 48)


NAMES = ("mixing", "query_closed", "query_open", "key_end", "decay", "erase", "restore")


def outputs_of(operators):
    whole = operators.transition_open
    rest = (operators.mixing, operators.query_closed, operators.query_open, operators.key_end)
    return {n: x for n, x in zip(NAMES, (*rest, whole.decay, whole.erase, whole.restore), strict=True) if x is not None}


def leaves_of(case, dtype=None):
    wide = case if dtype is None else case.map(lambda x: x.to(dtype))
    return [x.clone().requires_grad_() for x in wide.all[:2] + wide.all[3:] if x is not None]


def gradients_of(operators, leaves, upstream):
    outputs = outputs_of(operators)
    loss = sum((x.double() * upstream[name]).sum() for name, x in outputs.items() if name in upstream)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    names = ("dq", "dk", "dlog_decay", "dbeta")
    return {n: torch.zeros_like(x) if g is None else g for n, g, x in zip(names, grads, leaves, strict=False)}


def expected_operators(leaves, starts, boundary, chunk, heads, scale):
    q, k, g, *beta = (chunks_of(x, heads, chunk) for x in leaves)
    frozen = None if boundary is None else to_chunks(boundary.transpose(1, 2), chunk)
    sees = visible_tokens(starts.long(), chunk)
    return chunk_operators(q * scale, k, g, beta[0] if beta else None, sees, frozen_after=frozen)


def upstream_of(outputs, starts, chunk, dtype, frozen):
    """Random gradients of every output; none for reads of a frozen slot after its document, which never happen."""
    generator = torch.Generator().manual_seed(5)
    upstream = {n: torch.randn(x.shape, generator=generator).to(dtype).double() for n, x in outputs.items()}
    if frozen:
        continued = to_chunks(starts[:, None], chunk) <= torch.arange(
            0, upstream["mixing"].shape[2] * chunk, chunk
        ).view(1, 1, -1, 1)
        upstream["query_open"] = upstream["query_open"] * continued[..., None]
    return upstream


def limit_of(name, dtype):
    return RMS_FLOAT32 if dtype == torch.float32 else RMS_HALF.get(name, RMS_HALF["o"])


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New tensors hold NaN, so that whatever a kernel leaves unwritten or reads too early shows."""

    def poisoned(make):
        def allocate(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return allocate

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def check_operators(case, starts, boundary, chunk, *, dtype, only=NAMES):
    heads, scale = case.log_decay.shape[2], 0.3
    wide = leaves_of(case, torch.float64)
    expected = expected_operators(wide, starts, boundary, chunk, heads, scale)
    upstream = upstream_of(outputs_of(expected), starts, chunk, dtype, boundary is not None)
    upstream = {n: x for n, x in upstream.items() if n in only}
    leaves = leaves_of(case)
    q, k, g, *beta = leaves
    actual = chunk_operators_triton(
        q, k, g, beta[0] if beta else None, starts, boundary=boundary, scale=scale, chunk=chunk
    )
    assert outputs_of(actual).keys() == outputs_of(expected).keys()
    for name, x in outputs_of(actual).items():
        assert x.dtype == (torch.float32 if name == "decay" else dtype), name
        assert_rms_close(name, x.detach(), outputs_of(expected)[name].detach(), limit_of(name, dtype))
    grads = gradients_of(expected, wide, upstream)
    for name, x in gradients_of(actual, leaves, upstream).items():
        assert_rms_close(name, x, grads[name], limit_of(name, dtype))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("chunk,tokens,key_dim", [(16, 50, 20), (32, 70, 40)])
def test_operators_and_gradients_equal_the_definition(backbone, frozen, dtype, chunk, tokens, key_dim, poisoned_memory):
    """Packed documents, two heads a key head, a tail of padding and a K that fills no tile."""
    case = make_case(backbone, tokens=tokens, key_heads=2, heads=4, key_dim=key_dim, dtype=dtype)
    starts = document_starts(tokens)
    boundary = boundaries(starts, 4) if frozen else None
    check_operators(case, starts, boundary, chunk, dtype=dtype)
