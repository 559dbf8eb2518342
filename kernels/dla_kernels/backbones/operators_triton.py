"""Chunk operators of both backbones in Triton, differentiable (docs/dla.md section 5; operators.py is the definition).

Kept for backward besides the inputs and the outputs' mixing: cumulative decays, 8 to 12 bytes a token and head, and for
gated_deltanet the inverse X in float32, 4 C bytes (256 for C = 64, where the five other operators together take 1664
in 16 bits for K = 192). Making X again would be cheap in arithmetic, but it is the one part bound by latency.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dla_kernels.backbones.decays_triton import ChunkDecays, chunk_decays, decays_backward
from dla_kernels.backbones.gated_backward_triton import GatedGradients, gated_backward
from dla_kernels.backbones.gated_triton import gated_operators
from dla_kernels.backbones.inverse_triton import check_chunk, inverse
from dla_kernels.backbones.mamba2_triton import mamba2_backward, mamba2_operators
from dla_kernels.backbones.operators import ChunkOperators, Transition
from dla_kernels.launch import eager


@eager
def chunk_operators_triton(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    document_start: Tensor,
    *,
    boundary: Tensor | None,
    scale: float,
    chunk: int,
) -> ChunkOperators:
    """Operators [B,H,N,...] in q's dtype (decay float32) of q, k [B,T,Hk,K], log_decay, beta [B,T,H] (None: mamba2).

    document_start [B,T] int32; boundary [B,T,H] bool where closed slots are frozen, else None; scale multiplies q.
    Differentiable once in q, k, log_decay and beta. Raises ValueError for a chunk size the kernels are not built for.
    """
    check_chunk(chunk)
    mixing, closed, query, key_end, erase, restore, decay = _Operators.apply(
        q, k, log_decay, beta, document_start, boundary, float(scale), chunk
    )
    whole = Transition(decay, erase, restore)
    if boundary is None:
        return ChunkOperators(mixing, query, query, key_end, whole, whole)
    return ChunkOperators(mixing, closed, query, key_end, None, whole)


class _Operators(torch.autograd.Function):
    """mixing, query_closed (None: as query_open), query_open, key_end, erase, restore (None: mamba2) and decay."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor,
        beta: Tensor | None,
        document_start: Tensor,
        boundary: Tensor | None,
        scale: float,
        chunk: int,
    ) -> tuple[Tensor | None, ...]:
        q, k, log_decay, start = (x.contiguous() for x in (q, k, log_decay, document_start))
        beta, boundary = (None if x is None else x.contiguous() for x in (beta, boundary))
        decays = chunk_decays(log_decay, start, chunk, boundary=boundary)
        matrix = erase = restore = None
        if beta is None:
            mixing, closed, query, key_end = mamba2_operators(q, k, start, decays, scale)
        else:
            matrix = inverse(k, beta, start, decays, with_beta=False)
            mixing, closed, query, key_end, erase, restore = gated_operators(q, k, beta, start, decays, matrix, scale)
        saved = (q, k, log_decay, beta, start, boundary, matrix, None if beta is None else mixing)
        ctx.save_for_backward(*saved, decays.cum, decays.left, decays.segment, decays.decay)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return mixing, closed, query, key_end, erase, restore, decays.decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, log_decay, beta, start, boundary, matrix, mixing, *parts = ctx.saved_tensors
        decays = ChunkDecays(*parts)
        d_mixing, d_closed, d_query, d_key_end, d_erase, d_restore, d_decay = (
            None if x is None else x.contiguous() for x in grads
        )
        d_beta = None
        if beta is None:
            dq, dk, adjoints = mamba2_backward(q, k, start, decays, ctx.scale, d_mixing, d_closed, d_query, d_key_end)
        else:
            given = GatedGradients(d_mixing, d_closed, d_query, d_key_end, d_erase, d_restore)
            dq, dk, d_beta, adjoints = gated_backward(q, k, beta, start, decays, matrix, mixing, ctx.scale, given)
        d_log_decay = decays_backward(decays, log_decay, start, boundary, adjoints, d_decay)
        return dq, dk, d_log_decay, d_beta, None, None, None, None
