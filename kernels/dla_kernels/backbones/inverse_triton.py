# mypy: disable-error-code="no-untyped-def"
"""The write matrix T of gated_deltanet in Triton: a unit lower triangular inverse a chunk (docs/dla.md section 5).

    T = X diag(beta)      X = (I + L)^-1      L = strictlower(beta_i k_i.k_j e^(G_i-G_j))

Diagonal blocks of 16 are inverted by forward substitution, all of a chunk side by side, and joined by pairs,
X21 = -X22 L21 X11. A series of powers of L would be quicker and wrong: for repeated keys its terms grow like binomials
and cancel to nothing in float32. Blocks pass through the output itself, since a program cannot slice what it holds in
registers; barriers separate writing from reading.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.backbones.decays_triton import (
    ChunkDecays,
    chunk_decays,
    decay_table,
    same_segment,
    settings_of,
    visible,
)
from dla_kernels.launch import dot_precision, launch

CHUNKS = (16, 32, 64, 128)
"""Chunk sizes the kernels of this package are built for."""


@triton.jit
def key_products(p_k, m_t, row, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """k k^T [C, C] float32 of the tokens from the pointer on, `row` elements apart; 0 where not m_t."""
    o_r = tl.arange(0, C).to(tl.int64) * row
    b_s = tl.zeros([C, C], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        b_k = tl.load(p_k + o_r[:, None] + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_kt = tl.load(p_k + o_r[None, :] + o_k[:, None], mask=m_t[None, :] & m_k[:, None], other=0.0)
        b_s = tl.dot(b_k, b_kt, b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def load_beta(p_beta, m_t):
    """beta [C] float32. Loaded where it is used, once for each layout: kept, those copies would fill a thread."""
    return tl.load(p_beta, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def _invert_diagonal_blocks(p_x, C: tl.constexpr):
    """Replace the 16 x 16 diagonal blocks of -L [C, C] at the pointer by their part of X."""
    o_b = tl.arange(0, C // 16)
    o_r = tl.arange(0, 16)
    p_b = p_x + o_b * (16 * C + 16)
    b_x = tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0)[None, :, :] + tl.zeros([C // 16, 1, 1], tl.float32)
    for i in range(1, 16):
        b_l = tl.load(p_b[:, None] + i * C + o_r[None, :])
        b_row = tl.sum(b_l[:, :, None] * b_x, 1)
        b_x += tl.where(o_r[None, :, None] == i, b_row[:, None, :], 0.0)
    # All rows of -L are read before any block is written.
    tl.debug_barrier()
    tl.store(p_b[:, None, None] + o_r[None, :, None] * C + o_r[None, None, :], b_x)


@triton.jit
def _join_pairs(p_x, SIZE: tl.constexpr, C: tl.constexpr):
    """X21 = X22 (-L21) X11 for every pair of neighbouring diagonal blocks of SIZE, in place of -L21."""
    o_r = tl.arange(0, SIZE)
    o_tile = o_r[:, None] * C + o_r[None, :]
    for i in tl.static_range(C // (2 * SIZE)):
        p_1 = p_x + i * 2 * SIZE * (C + 1)
        p_21 = p_1 + SIZE * C
        b_1 = tl.load(p_1 + o_tile)
        b_2 = tl.load(p_21 + SIZE + o_tile)
        b_21 = tl.dot(tl.load(p_21 + o_tile), b_1, input_precision="tf32x3")
        b_21 = tl.dot(b_2, b_21, input_precision="tf32x3")
        tl.debug_barrier()
        tl.store(p_21 + o_tile, b_21)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "H", "HK", "N"])
def write_matrix_kernel(
    p_k, p_beta, p_start, p_cum, p_segment, p_x, T, H, HK, N,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, WITH_BETA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X [B, H, N, C, C] of one chunk and head a program; WITH_BETA: T."""
    i_p = tl.program_id(0).to(tl.int64)
    i_h = i_p % H
    i_n = (i_p // H) % N
    i_b = i_p // H // N
    i_o = (i_b * H + i_h) * N + i_n
    o_c = tl.arange(0, C)
    o_t = i_n * C + o_c
    p_k += ((i_b * T + i_n * C) * HK + i_h // (H // HK)) * K
    p_x += i_o * C * C
    p_beta += (i_b * T + o_t) * H + i_h
    b_l = key_products(p_k, o_t < T, HK * K, K, C, BK, PRECISION)
    m_sees = visible(p_start + i_b * T, i_n, T, C) & (o_c[:, None] > o_c[None, :])
    m_sees = m_sees & same_segment(p_segment, i_o, C)
    b_l *= -load_beta(p_beta, o_t < T)[:, None] * decay_table(p_cum, None, None, i_o, m_sees, C)
    o_tile = o_c[:, None] * C + o_c[None, :]
    tl.store(p_x + o_tile, b_l)
    tl.debug_barrier()
    _invert_diagonal_blocks(p_x, C)
    tl.debug_barrier()
    if C >= 32:
        _join_pairs(p_x, 16, C)
    if C >= 64:
        _join_pairs(p_x, 32, C)
    if C >= 128:
        _join_pairs(p_x, 64, C)
    if WITH_BETA:
        b_x = tl.load(p_x + o_tile)
        tl.debug_barrier()
        tl.store(p_x + o_tile, b_x * load_beta(p_beta, o_t < T)[None, :])


def write_matrix_triton(
    k: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    document_start: Tensor,
    chunk: int,
    *,
    boundary: Tensor | None = None,
) -> Tensor:
    """T [B,H,N,C,C] float32 of k [B,T,Hk,K], log_decay, beta [B,T,H] and document_start [B,T] int32.

    Rows and columns of padding are zero, and so are pairs of different documents or, with boundary [B,T,H] bool, of
    different segments. Raises ValueError for a chunk not in CHUNKS.
    """
    check_chunk(chunk)
    k, log_decay, beta, document_start = (x.contiguous() for x in (k, log_decay, beta, document_start))
    boundary = None if boundary is None else boundary.contiguous()
    decays = chunk_decays(log_decay, document_start, chunk, boundary=boundary)
    return inverse(k, beta, document_start, decays, with_beta=True)


def inverse(k: Tensor, beta: Tensor, document_start: Tensor, decays: ChunkDecays, *, with_beta: bool) -> Tensor:
    """X, or T = X diag(beta), [B,H,N,C,C] float32, of contiguous inputs as in `write_matrix_triton`."""
    batch, tokens, key_heads, key_dim = k.shape
    _, heads, chunks, chunk = decays.cum.shape
    out = torch.empty(batch, heads, chunks, chunk, chunk, dtype=torch.float32, device=k.device)
    launch(
        write_matrix_kernel, (batch * chunks * heads,),
        k, beta, document_start, decays.cum, decays.segment, out, tokens, heads, key_heads, chunks,
        K=key_dim, C=chunk, WITH_BETA=with_beta, PRECISION=dot_precision(k.dtype),
        **settings_of("write_matrix", k.device, chunk, key_dim),
    )  # fmt: skip
    return out


def check_chunk(chunk: int) -> None:
    """Raises ValueError for a chunk size the kernels are not built for."""
    if chunk not in CHUNKS:
        raise ValueError(f"chunk size {chunk} is not one of {CHUNKS}; the Triton kernels are built for these")
