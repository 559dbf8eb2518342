# mypy: disable-error-code="no-untyped-def"
"""Gradients of gated_deltanet's chunk operators in Triton (gated_triton.py, docs/dla.md section 5).

With dM' = dM - dQ (gam k)^T, the whole adjoint of M = A T:

    dA = dM' T^T      dT = A^T dM' + dWy (gam k)^T + (end k) dK~^T      P = X^T dT      dL = -strictlower(P T^T)

since T = (I + L)^-1 diag(beta); P's diagonal is the gradient of that diag(beta). One kernel follows mixing and query
down to q k^T, one T down to k k^T and beta, and one turns these C x C adjoints into dq and dk: a single kernel would
hold more than a thread's registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.backbones.decays_triton import (
    ChunkDecays,
    DecayAdjoints,
    decay_table,
    end_decay,
    entered_open,
    read_decay,
    same_segment,
    settings_of,
    start_decay,
    visible,
)
from dla_kernels.backbones.inverse_triton import key_products, load_beta
from dla_kernels.backbones.mamba2_triton import scores_of
from dla_kernels.launch import cdiv, dot_precision, launch


@dataclass(frozen=True)
class GatedGradients:
    """Adjoints of the operators, each as its operator or None where nothing depends on it."""

    mixing: Tensor | None
    query_closed: Tensor | None
    query_open: Tensor | None
    key_end: Tensor | None
    erase: Tensor | None
    restore: Tensor | None


@triton.jit
def _outer(p_a, p_k, m_t, row, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """a k^T [C, C] of a [C, K] at the pointer and the keys of the chunk, both in float32."""
    o_c = tl.arange(0, C)
    b_s = tl.zeros([C, C], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        b_a = tl.load(p_a + o_c[:, None] * K + o_k[None, :], mask=m_k[None, :], other=0.0)
        o_kt = o_c.to(tl.int64)[None, :] * row + o_k[:, None]
        b_kt = tl.load(p_k + o_kt, mask=m_t[None, :] & m_k[:, None], other=0.0)
        b_s = tl.dot(b_a, b_kt, b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def _outer_of_keys(p_k, p_a, m_t, row, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """k a^T [C, C], as `_outer`."""
    o_c = tl.arange(0, C)
    b_s = tl.zeros([C, C], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        o_in = o_c.to(tl.int64)[:, None] * row + o_k[None, :]
        b_k = tl.load(p_k + o_in, mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_at = tl.load(p_a + o_c[None, :] * K + o_k[:, None], mask=m_k[:, None], other=0.0)
        b_s = tl.dot(b_k, b_at, b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def _product(p_a, p_b, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """a b [C, C] of float32 matrices in memory, or their transposes; for C so large that no program holds two."""
    o_c = tl.arange(0, C)
    b_ab = tl.zeros([C, C], tl.float32)
    for i in range(0, C, 32):
        o_i = i + tl.arange(0, 32)
        b_a = tl.load(p_a + (o_i[None, :] * C + o_c[:, None] if A_TURNED else o_c[:, None] * C + o_i[None, :]))
        b_b = tl.load(p_b + (o_c[None, :] * C + o_i[:, None] if B_TURNED else o_i[:, None] * C + o_c[None, :]))
        b_ab = tl.dot(b_a, b_b, b_ab, input_precision=PRECISION)
    return b_ab


@triton.jit
def _row_products(p_a, p_x, m_t, row, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """a_i . x_i [C] of a [C, K] at the pointer and the inputs x of the chunk, in float32."""
    o_c = tl.arange(0, C)
    b_s = tl.zeros([C], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        b_a = tl.load(p_a + o_c[:, None] * K + o_k[None, :], mask=m_k, other=0.0).to(tl.float32)
        o_in = o_c.to(tl.int64)[:, None] * row + o_k[None, :]
        b_x = tl.load(p_x + o_in, mask=m_t[:, None] & m_k, other=0.0).to(tl.float32)
        b_s += tl.sum(b_a * b_x, 1)
    return b_s


@triton.jit(do_not_specialize=["T", "H", "HK", "N"])
def gated_mixing_backward_kernel(
    p_q, p_k, p_beta, p_start, p_cum, p_left, p_segment, p_decay, p_x, p_mixing, p_d_mixing, p_d_query,
    p_d_scores, p_d_matrix, p_d_cum, p_d_end, p_d_read, scale, T, H, HK, N,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d (q k^T) [B,H,N,C,C], what mixing and query give dT [B,H,N,C,C] float32 and the decays; a chunk and head a
    program."""
    i_p = tl.program_id(0).to(tl.int64)
    i_h = i_p % H
    i_n = (i_p // H) % N
    i_b = i_p // H // N
    i_c = (i_b * H + i_h) * N + i_n
    dtype = p_k.dtype.element_ty
    o_c = tl.arange(0, C)
    o_t = i_n * C + o_c
    m_t = o_t < T
    o_tile = o_c[:, None] * C + o_c[None, :]
    o_turned = o_c[None, :] * C + o_c[:, None]
    i_in = ((i_b * T + i_n * C) * HK + i_h // (H // HK)) * K
    row = HK * K
    p_d_scores += i_c * C * C

    b_m = tl.load(p_mixing + i_c * C * C + o_tile).to(tl.float32)
    b_dm = tl.zeros([C, C], tl.float32)
    b_d_cum = tl.zeros([C], tl.float32)
    b_d_end = tl.zeros([C], tl.float32)
    b_d_read = tl.zeros([C], tl.float32)
    if p_d_query is not None:
        b_start = start_decay(p_cum, i_c, C) * entered_open(p_segment, i_c, C)
        b_w = _outer(p_d_query + i_c * C * K, p_k + i_in, m_t, row, K, C, BK, PRECISION) * b_start[None, :]
        b_dm -= b_w
        b_d_read = _row_products(p_d_query + i_c * C * K, p_q + i_in, m_t, row, K, C, BK)
        b_d_read *= read_decay(p_cum, p_segment, p_decay, i_c, C) * scale
        b_d_read -= tl.sum(b_m * b_w, 1)
    if p_d_mixing is not None:
        b_w = tl.load(p_d_mixing + i_c * C * C + o_tile).to(tl.float32)
        b_dm += b_w
        # An entry's own token reads it before it decays: its two shares would cancel but for their rounding.
        b_w = tl.where(o_c[:, None] == o_c[None, :], 0.0, b_w * b_m)
        m_same = same_segment(p_segment, i_c, C)
        b_d_cum += tl.sum(tl.where(m_same, b_w, 0.0), 1) - tl.sum(b_w, 0)
        b_d_end += tl.sum(tl.where(m_same, 0.0, b_w), 0)
    tl.store(p_d_cum + i_c * C + o_c, b_d_cum)
    tl.store(p_d_end + i_c * C + o_c, b_d_end)
    tl.store(p_d_read + i_c * C + o_c, b_d_read)

    b_dm = b_dm.to(dtype)
    b_decay = decay_table(p_cum, p_left, p_segment, i_c, visible(p_start + i_b * T, i_n, T, C), C) * scale
    b_a = scores_of(p_q + i_in, p_k + i_in, m_t, row, K, C, BK, PRECISION) * b_decay
    tl.store(p_d_scores + o_tile, b_a.to(dtype))
    b_beta = load_beta(p_beta + (i_b * T + o_t) * H + i_h, m_t)
    b_tt = (tl.load(p_x + i_c * C * C + o_turned) * b_beta[:, None]).to(dtype)
    b_da = tl.dot(b_dm, b_tt, input_precision=PRECISION) * b_decay
    tl.debug_barrier()
    b_dt = tl.dot(tl.load(p_d_scores + o_turned), b_dm, input_precision=PRECISION)
    tl.store(p_d_matrix + i_c * C * C + o_tile, b_dt)
    tl.debug_barrier()
    tl.store(p_d_scores + o_tile, b_da.to(dtype))


@triton.jit(do_not_specialize=["T", "H", "HK", "N"])
def gated_matrix_backward_kernel(
    p_k, p_beta, p_start, p_cum, p_left, p_segment, p_x, p_d_matrix, p_d_key_end, p_d_erase, p_d_restore,
    p_d_gram, p_d_beta, p_d_erased, p_d_key, T, H, HK, N,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d (k k^T) [B,H,N,C,C], dbeta [B,T,H] and what erase, key_end and restore give the decays; a chunk and head a
    program."""
    i_p = tl.program_id(0).to(tl.int64)
    i_h = i_p % H
    i_n = (i_p // H) % N
    i_b = i_p // H // N
    i_c = (i_b * H + i_h) * N + i_n
    o_c = tl.arange(0, C)
    o_t = i_n * C + o_c
    m_t = o_t < T
    o_tile = o_c[:, None] * C + o_c[None, :]
    o_turned = o_c[None, :] * C + o_c[:, None]
    i_out = i_c * C * K
    row = HK * K
    p_k += ((i_b * T + i_n * C) * HK + i_h // (H // HK)) * K
    p_x += i_c * C * C
    p_beta += (i_b * T + o_t) * H + i_h

    b_dt = tl.zeros([C, C], tl.float32)
    b_d_erased = tl.zeros([C], tl.float32)
    b_d_key = tl.zeros([C], tl.float32)
    if p_d_erase is not None:
        b_dt = _outer(p_d_erase + i_out, p_k, m_t, row, K, C, BK, PRECISION)
        b_dt *= (start_decay(p_cum, i_c, C) * entered_open(p_segment, i_c, C))[None, :]
        b_d_erased += tl.sum(tl.load(p_x + o_tile) * load_beta(p_beta, m_t)[None, :] * b_dt, 1)
    if p_d_key_end is not None:
        b_w = _outer_of_keys(p_k, p_d_key_end + i_out, m_t, row, K, C, BK, PRECISION)
        b_w *= end_decay(p_left, i_c, C)[:, None]
        b_d_key += tl.sum(tl.load(p_x + o_tile) * load_beta(p_beta, m_t)[None, :] * b_w, 0)
        b_dt += b_w
    if p_d_restore is not None:
        b_open = end_decay(p_left, i_c, C) * entered_open(p_segment, i_c, C)
        b_d_key += b_open * _row_products(p_d_restore + i_out, p_k, m_t, row, K, C, BK)
    tl.store(p_d_erased + i_c * C + o_c, b_d_erased)
    tl.store(p_d_key + i_c * C + o_c, b_d_key)

    p_d_matrix += i_c * C * C
    b_dt += tl.load(p_d_matrix + o_tile)
    if C <= 64:
        b_p = tl.dot(tl.load(p_x + o_turned), b_dt, input_precision=PRECISION)
        b_dl = tl.dot(b_p * -load_beta(p_beta, m_t)[None, :], tl.load(p_x + o_turned), input_precision=PRECISION)
    else:
        tl.store(p_d_matrix + o_tile, b_dt)
        tl.debug_barrier()
        b_p = _product(p_x, p_d_matrix, True, False, C, PRECISION)
        tl.debug_barrier()
        tl.store(p_d_matrix + o_tile, b_p * -load_beta(p_beta, m_t)[None, :])
        tl.debug_barrier()
        b_dl = _product(p_d_matrix, p_x, False, True, C, PRECISION)
    b_d_beta = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_p, 0.0), 1)
    m_sees = visible(p_start + i_b * T, i_n, T, C) & same_segment(p_segment, i_c, C) & (o_c[:, None] > o_c[None, :])
    b_dl *= decay_table(p_cum, None, None, i_c, m_sees, C)
    b_gram = b_dl * load_beta(p_beta, m_t)[:, None]
    tl.store(p_d_gram + i_c * C * C + o_tile, b_gram.to(p_d_gram.dtype.element_ty))
    b_d_beta += tl.sum(b_dl * key_products(p_k, m_t, row, K, C, BK, PRECISION), 1)
    tl.store(p_d_beta + (i_b * T + o_t) * H + i_h, b_d_beta.to(p_d_beta.dtype.element_ty), mask=m_t)


@triton.jit(do_not_specialize=["T", "H", "HK", "N"])
def gated_inputs_kernel(
    p_q, p_k, p_beta, p_cum, p_left, p_segment, p_decay, p_x, p_mixing, p_d_scores, p_d_gram,
    p_d_query_closed, p_d_query_open, p_d_key_end, p_d_erase, p_d_restore, p_dq, p_dk, scale, T, H, HK, N,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk [B, T, H, K] of one chunk, head and tile of K a program."""
    tiles: tl.constexpr = tl.cdiv(K, BK)
    i_p = tl.program_id(0).to(tl.int64)
    i_k = i_p % tiles
    i_h = (i_p // tiles) % H
    i_n = (i_p // tiles // H) % N
    i_b = i_p // tiles // H // N
    i_c = (i_b * H + i_h) * N + i_n
    dtype = p_k.dtype.element_ty
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    o_t = i_n * C + o_c
    m_in = (o_t < T)[:, None] & (o_k < K)[None, :]
    m_k = (o_k < K)[None, :]
    o_in = ((i_b * T + o_t) * HK + i_h // (H // HK))[:, None] * K + o_k[None, :]
    o_out = i_c * C * K + o_c[:, None] * K + o_k[None, :]
    o_tile = i_c * C * C + o_c[:, None] * C + o_c[None, :]
    o_turned = i_c * C * C + o_c[None, :] * C + o_c[:, None]
    p_beta += (i_b * T + o_t) * H + i_h

    b_k = tl.load(p_k + o_in, mask=m_in, other=0.0)
    b_dq = tl.dot(tl.load(p_d_scores + o_tile), b_k, input_precision=PRECISION)
    b_dk = tl.zeros([C, BK], tl.float32)
    if p_d_erase is not None:
        b_tt = (tl.load(p_x + o_turned) * load_beta(p_beta, o_t < T)[:, None]).to(dtype)
        b_g = tl.load(p_d_erase + o_out, mask=m_k, other=0.0)
        b_dk = tl.dot(b_tt, b_g, b_dk, input_precision=PRECISION)
    if p_d_query_open is not None:
        b_g = tl.load(p_d_query_open + o_out, mask=m_k, other=0.0)
        b_dk -= tl.dot(tl.load(p_mixing + o_turned), b_g, input_precision=PRECISION)
        b_dq += (read_decay(p_cum, p_segment, p_decay, i_c, C) * scale)[:, None] * b_g.to(tl.float32)
    b_dk *= (start_decay(p_cum, i_c, C) * entered_open(p_segment, i_c, C))[:, None]
    if p_d_query_closed is not None:
        b_dq += scale * tl.load(p_d_query_closed + o_out, mask=m_k, other=0.0).to(tl.float32)
    o_dx = ((i_b * T + o_t) * H + i_h)[:, None] * K + o_k[None, :]
    tl.store(p_dq + o_dx, b_dq.to(p_dq.dtype.element_ty), mask=m_in)

    b_left = tl.zeros([C, BK], tl.float32)
    if p_d_key_end is not None:
        b_t = (tl.load(p_x + o_tile) * load_beta(p_beta, o_t < T)[None, :]).to(dtype)
        b_g = tl.load(p_d_key_end + o_out, mask=m_k, other=0.0)
        b_left = tl.dot(b_t, b_g, b_left, input_precision=PRECISION)
    if p_d_restore is not None:
        b_g = tl.load(p_d_restore + o_out, mask=m_k, other=0.0).to(tl.float32)
        b_left += entered_open(p_segment, i_c, C)[:, None] * b_g
    b_dk += end_decay(p_left, i_c, C)[:, None] * b_left
    b_q = tl.load(p_q + o_in, mask=m_in, other=0.0)
    b_dk = tl.dot(tl.load(p_d_scores + o_turned), b_q, b_dk, input_precision=PRECISION)
    b_gram = tl.load(p_d_gram + o_tile).to(tl.float32) + tl.load(p_d_gram + o_turned).to(tl.float32)
    b_dk = tl.dot(b_gram.to(dtype), b_k, b_dk, input_precision=PRECISION)
    tl.store(p_dk + o_dx, b_dk.to(p_dk.dtype.element_ty), mask=m_in)


def gated_backward(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    document_start: Tensor,
    decays: ChunkDecays,
    inverse: Tensor,
    mixing: Tensor,
    scale: float,
    grads: GatedGradients,
) -> tuple[Tensor, Tensor, Tensor, DecayAdjoints]:
    """dq, dk as q [B,T,Hk,K], dbeta as beta [B,T,H] and the adjoints of the decays."""
    _, tokens, key_heads, key_dim = k.shape
    batch, heads, chunks, chunk = decays.cum.shape
    d_scores, d_gram = torch.empty_like(mixing), torch.empty_like(mixing)
    d_beta = torch.empty_like(beta)
    d_cum, d_end, d_key = (torch.empty_like(decays.cum) for _ in range(3))
    # Like queries, erasing keys of the segment that entered open are scaled by what is left of its state.
    d_read = decays.cum.new_empty(2, *decays.cum.shape)
    d_matrix = torch.empty_like(inverse)
    sizes = {"K": key_dim, "C": chunk, "PRECISION": dot_precision(q.dtype)}
    launch(
        gated_mixing_backward_kernel, (batch * chunks * heads,),
        q, k, beta, document_start, decays.cum, decays.left, decays.segment, decays.decay, inverse, mixing,
        grads.mixing, grads.query_open, d_scores, d_matrix, d_cum, d_end, d_read[0], scale,
        tokens, heads, key_heads, chunks, **sizes, **settings_of("gated_mixing_backward", q.device, chunk, key_dim),
    )  # fmt: skip
    launch(
        gated_matrix_backward_kernel, (batch * chunks * heads,),
        k, beta, document_start, decays.cum, decays.left, decays.segment, inverse, d_matrix,
        grads.key_end, grads.erase, grads.restore, d_gram, d_beta, d_read[1], d_key,
        tokens, heads, key_heads, chunks, **sizes, **settings_of("gated_matrix_backward", q.device, chunk, key_dim),
    )  # fmt: skip
    group = heads // key_heads
    dq, dk = (q.new_empty(batch, tokens, heads, key_dim, dtype=q.dtype if group == 1 else torch.float32) for _ in "qk")
    settings = settings_of("gated_inputs", q.device, chunk, key_dim)
    launch(
        gated_inputs_kernel, (batch * chunks * heads * cdiv(key_dim, settings["BK"]),),
        q, k, beta, decays.cum, decays.left, decays.segment, decays.decay, inverse, mixing, d_scores, d_gram,
        grads.query_closed, grads.query_open, grads.key_end, grads.erase, grads.restore, dq, dk, scale,
        tokens, heads, key_heads, chunks, **sizes, **settings,
    )  # fmt: skip
    if group > 1:
        dq, dk = (x.unflatten(2, (key_heads, group)).sum(3).to(q.dtype) for x in (dq, dk))
    return dq, dk, d_beta, DecayAdjoints(d_cum, d_end, d_read, d_key[None])
