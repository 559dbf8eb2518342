"""Chunk operators in Triton kernels against their PyTorch form in float64, outputs and gradients by name."""

import pytest
import torch
from kernel_cases import BACKBONES, Case, make_case
from tolerances import RMS_FLOAT32, RMS_HALF, assert_rms_close

from dla_kernels.backbones.operators import chunk_operators, document_cumsum, visible_tokens, write_matrix
from dla_kernels.inputs import heads_first, to_chunks
from dla_kernels.launch import override_tuning

pytest.importorskip("triton", reason="kernels need Triton")

from dla_kernels.backbones.inverse_triton import write_matrix_triton  # noqa: E402
from dla_kernels.backbones.operators_triton import chunk_operators_triton  # noqa: E402
from tests.rounding import rounding_as_a_gpu  # noqa: E402


def document_starts(tokens, batch=2):
    """Documents that begin inside, at the edge of and alone in a chunk of 16; the last row's first began before it."""
    starts = torch.zeros(batch, tokens, dtype=torch.int32)
    for row, edges in zip(starts, ([7, 16, 17, 40], [32, 35]), strict=False):
        for edge in edges:
            row[edge:] = edge
    starts[-1] = torch.where(starts[-1] == 0, -3, starts[-1])
    return starts


def boundaries(starts, heads, seed=3):
    """Boundaries [B, T, H] at random and at every document start."""
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


def check_operators(case, starts, boundary, chunk, *, dtype, only=NAMES, without=()):
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
    targets, grads = gradients_of(expected, wide, upstream), gradients_of(actual, leaves, upstream)
    for name, x in grads.items():
        if name not in without:
            assert_rms_close(name, x, targets[name], limit_of(name, dtype))
    return grads


@pytest.fixture
def small_tiles():
    """Tiles of 16 in K and 2 heads a program, so that small shapes take several of both, the last one in part."""
    tiles = {"BK": 16}
    mamba2 = {
        name: tiles | {"HEADS": 2} for name in ("mamba2_operators", "mamba2_scores_backward", "mamba2_input_backward")
    }
    gated = ("write_matrix", "gated_operators", "gated_mixing_backward", "gated_matrix_backward", "gated_inputs")
    with override_tuning(**mamba2, **dict.fromkeys(gated, tiles)):
        yield


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype,chunk", [(torch.float32, 16), (torch.float16, 32), (torch.bfloat16, 32)])
def test_operators_and_gradients_equal_the_definition(backbone, frozen, dtype, chunk, small_tiles, poisoned_memory):
    """Packed documents, three heads a key head, a tail of padding and a K that fills no tile."""
    case = make_case(backbone, tokens=50, key_heads=1, heads=3, key_dim=20, dtype=dtype)
    starts = document_starts(50)
    boundary = boundaries(starts, 3) if frozen else None
    with rounding_as_a_gpu():
        check_operators(case, starts, boundary, chunk, dtype=dtype)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_sequences_around_one_chunk_need_no_padding(backbone, tokens, poisoned_memory):
    case = make_case(backbone, batch=1, tokens=tokens, key_heads=2, heads=2, dtype=torch.float32)
    starts = torch.zeros(1, tokens, dtype=torch.int32)
    check_operators(case, starts, None, 16, dtype=torch.float32)


@pytest.mark.parametrize("backbone,name", [("mamba2", n) for n in NAMES[:5]] + [("gated_deltanet", n) for n in NAMES])
def test_a_gradient_of_one_operator_alone_needs_no_zeros_for_the_others(backbone, name, poisoned_memory):
    case = make_case(backbone, batch=1, tokens=20, heads=2, dtype=torch.float32)
    starts = document_starts(20, batch=1)
    check_operators(case, starts, boundaries(starts, 2), 16, dtype=torch.float32, only=(name,))


def within_poison(x):
    """The same values as a view of a larger tensor of NaN: strided, and with nothing readable around."""
    buffer = torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype)
    inner = buffer[tuple(slice(1, -1) for _ in x.shape)]
    return inner.copy_(x)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_views_of_larger_tensors_give_the_same_operators(backbone):
    case = make_case(backbone, tokens=20, heads=2, dtype=torch.float32)
    starts = document_starts(20)

    def run(inputs):
        operators = chunk_operators_triton(
            *inputs.all[:2], inputs.log_decay, inputs.beta, starts, boundary=None, scale=1.0, chunk=16
        )
        return outputs_of(operators)

    expected = run(case)
    for name, x in run(case.map(within_poison)).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_another_document_of_the_chunk_changes_not_a_bit(backbone):
    case = make_case(backbone, batch=1, tokens=32, heads=2, dtype=torch.float32, decay=3.0)
    starts = torch.zeros(1, 32, dtype=torch.int32)
    starts[:, 11:] = 11
    results = []
    for inputs in (case, make_case(backbone, batch=1, tokens=32, heads=2, dtype=torch.float32, decay=3.0, seed=9)):
        joined = Case(
            *(
                None if x is None else torch.cat([y[:, :11], x[:, 11:]], 1)
                for x, y in zip(case.all, inputs.all, strict=True)
            )
        )
        operators = chunk_operators_triton(
            joined.q, joined.k, joined.log_decay, joined.beta, starts, boundary=None, scale=1.0, chunk=32
        )
        results.append({n: x if n == "decay" else x[..., 11:, :] for n, x in outputs_of(operators).items()})
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


@pytest.mark.parametrize("chunk", [64, 128])
def test_large_chunks_equal_the_definition(chunk, poisoned_memory):
    """Above 64 tokens, products of two float32 tables go through memory."""
    case = make_case("gated_deltanet", batch=1, tokens=100, heads=1, dtype=torch.float32)
    check_operators(case, document_starts(100, batch=1), None, chunk, dtype=torch.float32)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["mixing", "key_end"])
def test_writes_read_before_they_decay_do_not_drown_the_gradients_of_decayed_ones(frozen, name):
    """A token's own write and the last token's are e^12 times the others here, and give log_decay nothing."""
    case = make_case("mamba2", batch=1, tokens=16, heads=2, dtype=torch.float32)
    case.log_decay[:] = -12.0 - case.log_decay
    starts = torch.zeros(1, 16, dtype=torch.int32)
    boundary = torch.zeros(1, 16, 2, dtype=torch.bool) if frozen else None
    grads = []
    for leaves in (leaves_of(case, torch.float64), leaves_of(case)):
        if leaves[0].dtype == torch.float64:
            operators = expected_operators(leaves, starts, boundary, 16, 2, 1.0)
        else:
            operators = chunk_operators_triton(*leaves, None, starts, boundary=boundary, scale=1.0, chunk=16)
        grads.append(torch.autograd.grad(outputs_of(operators)[name].sum(), leaves[2])[0])
    assert ((grads[1] - grads[0]).norm() / grads[0].norm()) < 1e-5


@pytest.mark.parametrize("frozen", [False, True])
def test_strong_decays_and_repeated_keys_leave_operators_and_gradients_exact(frozen):
    """Where every token erases all before it, a segment's true dlog_decay is 0 but for 1e-9: its size is judged."""
    case = make_case("gated_deltanet", batch=1, dtype=torch.float32, tokens=32, heads=2, decay=20.0)
    case.k[:] = case.k[:, :1]
    case.beta[:] = 1.0
    case.log_decay[:, ::2] = 0.0
    starts = torch.zeros(1, 32, dtype=torch.int32)
    if frozen:
        grads = check_operators(case, starts, boundaries(starts, 2), 32, dtype=torch.float32, without=("dlog_decay",))
        assert grads["dlog_decay"].abs().max() < 1e-4
    else:
        check_operators(case, starts, None, 32, dtype=torch.float32)
