"""Chunk operators in Triton kernels against their PyTorch form in float64, outputs and gradients by name."""

import pytest
import torch
from kernel_cases import BACKBONES, make_case
from tolerances import RMS_FLOAT32, RMS_HALF, assert_rms_close

from dla_kernels.backbones.operators import causal_decay, chunk_operators, document_cumsum, visible_tokens, write_matrix
from dla_kernels.inputs import heads_first, to_chunks

triton_modules = pytest.importorskip("triton", reason="kernels need Triton")

from dla_kernels.backbones.inverse_triton import write_matrix_triton  # noqa: E402


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
