"""Drift scores and boundaries in Triton kernels: `chunk_drift` of drift.py, stage by stage (docs/dla.md section 6).

All of a chunk's pairs are scored in parallel (drift_tables_triton.py); then only integers pass from chunk to chunk
(drift_walk_triton.py). Both keep C x C tables, 8 C bytes a token and head (gated_deltanet 16 C + 8 K), and room for a
state a chunk, 4 K V / C: so a row is cut into spans of chunks, and their workspace, a ring of chunks, is used anew by
every span. Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dla_kernels.backbones.inverse_triton import write_matrix_triton
from dla_kernels.launch import cdiv, dot_precision, launch, power_of_2, tuning
from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.drift import Drift, open_state
from dla_kernels.memory.drift_gradients_triton import drift_gradients_kernel, drift_reads_kernel
from dla_kernels.memory.drift_tables_triton import (
    STEPS,
    TERMS,
    drift_keys_kernel,
    drift_links_kernel,
    drift_tables_kernel,
)
from dla_kernels.memory.drift_walk_triton import (
    BEFORE_ROW,
    ENTRY,
    drift_entry_kernel,
    drift_follow_kernel,
    drift_guess_kernel,
    drift_states_kernel,
    drift_walk_kernel,
)

MOST_CHUNK = 32
"""Tokens of a chunk here, at most: tables cost C^2, and decisions do not depend on how a row is cut."""
WORKSPACE_BYTES = 2**29
"""Of one span, about; at least one chunk is taken."""
LINKED = 2
"""Chunks before a span that it still reads of the workspace."""


def chunk_drift_triton(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    document_start: Tensor,
    *,
    tau: Tensor,
    drift: str,
    cache: MergeCache | None,
    chunk: int,
    gradients: bool,
) -> Drift:
    """Score every token against the open state before it and open a slot where the score reaches tau [H].

    Shapes and results as `chunk_drift`; no float64. Gradients are 0 at a document's first token, whose score is fixed.
    """
    planner = _Planner(k, v, log_decay, beta, document_start, tau, drift, min(power_of_2(chunk, 16), MOST_CHUNK))
    planner.start(cache)
    grads = planner.gradient_buffers() if gradients else None
    for first in range(0, planner.chunks, planner.span):
        planner.plan(first, min(planner.span, planner.chunks - first), grads)
    return Drift(
        planner.score,
        planner.boundary,
        None if grads is None else (grads[0].transpose(1, 2), grads[1].transpose(1, 2)),
    )


@dataclass(frozen=True)
class _Workspace:
    """What kernels hand to each other, a ring of R chunks: chunk n lies at n % R."""

    terms: Tensor
    """[B, H, R, TERMS, C] float32; the rows are named in drift_tables_triton.py."""
    steps: Tensor
    """[B, H, R, STEPS, C] int32; likewise."""
    score: Tensor
    """[B, H, R, 2, C, C] float32: against openings in the chunk itself and in the one before; only what walks meet."""
    states: Tensor
    """[B, H, R, K, V] float32: those that chunks are entered with, where a segment is older than the chunk before."""
    entry: Tensor
    """[B, H, R, ENTRY] int32; the rows are named in drift_walk_triton.py."""
    entry_norm: Tensor
    """[B, H, R] float32: |S|^2 of `states`."""
    recall: Tensor | None
    """[B, H, R, C, C] float32, with beta: S_[a,t)^T k_t = sum_{l >= a} recall[t, l] v_l."""
    key_open: Tensor | None
    """[B, H, R, C, K] float32, with beta: what reads the state the chunk was entered with."""
    key_end: Tensor | None
    """[B, H, R, C, K] float32, with beta: a token's key at the chunk's end."""


def _chunk_bytes(key_dim: int, value_dim: int, chunk: int, gated: bool) -> int:
    """Workspace bytes of one chunk and head, the write matrix T included."""
    rows = TERMS.value + STEPS.value + 2 * chunk
    if gated:
        rows += 2 * chunk + 2 * key_dim
    return 4 * (rows * chunk + key_dim * value_dim + ENTRY.value + 1)


class _Planner:
    """One call: checked and contiguous inputs, results, and the workspace of a span."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor | None,
        document_start: Tensor,
        tau: Tensor,
        drift: str,
        chunk: int,
    ) -> None:
        self.batch, self.tokens, self.heads, self.value_dim = v.shape
        self.key_heads, self.key_dim = k.shape[2:]
        self.k, self.v, self.log_decay = k.contiguous(), v.contiguous(), log_decay.contiguous()
        self.beta = None if beta is None else beta.contiguous()
        self.document_start = document_start.to(torch.int32).contiguous()
        self.tau = tau.to(device=k.device, dtype=torch.float32).contiguous()
        self.chunk, self.chunks = chunk, cdiv(self.tokens, chunk)
        lists = self.batch * self.heads
        chunk_bytes = lists * _chunk_bytes(self.key_dim, self.value_dim, chunk, beta is not None)
        self.span = max(1, min(self.chunks, WORKSPACE_BYTES // chunk_bytes - LINKED))
        self.ring = self.span + LINKED
        self.work = self._workspace()
        device = k.device
        self.score = torch.empty(self.batch, self.heads, self.tokens, dtype=torch.float32, device=device)
        self.boundary = torch.empty(self.score.shape, dtype=torch.bool, device=device)
        self.newest = torch.full((*self.score.shape[:2], BEFORE_ROW.value + self.chunks), -1, device=device).int()
        self.opened = torch.full(self.score.shape[:2], -1, dtype=torch.int32, device=device)
        precision = "tf32x3" if dot_precision(k.dtype) != "ieee" else "ieee"
        self.shape = {"K": self.key_dim, "V": self.value_dim, "C": chunk}
        self.numbers = {"UPDATE": drift == "update", "PRECISION": precision}

    def _workspace(self) -> _Workspace:
        size, key_dim = self.chunk, self.key_dim

        def ring(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(self.batch, self.heads, self.ring, *shape, dtype=dtype, device=self.k.device)

        return _Workspace(
            terms=ring(TERMS.value, size),
            steps=ring(STEPS.value, size, dtype=torch.int32),
            score=ring(2, size, size),
            states=ring(key_dim, self.value_dim),
            entry=ring(ENTRY.value, dtype=torch.int32),
            entry_norm=ring(),
            recall=None if self.beta is None else ring(size, size),
            key_open=None if self.beta is None else ring(size, key_dim),
            key_end=None if self.beta is None else ring(size, key_dim),
        )

    def start(self, cache: MergeCache | None) -> None:
        """The state that the row is entered with: a carried one, or none."""
        if cache is None:
            self.work.states[:, :, 0] = 0.0
        else:
            self.work.states[:, :, 0] = open_state(cache)

    def gradient_buffers(self) -> tuple[Tensor, Tensor]:
        """d score / d k [B, T, H, K] and d score / d v [B, T, H, V] float32, not yet written."""
        shape, device = self.v.shape[:3], self.v.device
        grad_k = torch.empty(*shape, self.key_dim, dtype=torch.float32, device=device)
        return grad_k, torch.empty(*shape, self.value_dim, dtype=torch.float32, device=device)

    def plan(self, first: int, chunks: int, grads: tuple[Tensor, Tensor] | None) -> None:
        """Scores and boundaries, and where asked for gradients, of `chunks` chunks from `first` on."""
        work, matrix = self.work, self._write_matrix(first, chunks)
        inputs = (self.k, self.v, self.log_decay, self.beta, self.document_start)
        keys = (work.recall, work.key_open, work.key_end)
        place = (first, chunks, self.ring)
        row = (*place, self.chunks)
        lists = self.batch * self.heads
        launch(
            drift_tables_kernel, (lists * chunks,),
            *inputs, self.tau, matrix, work.terms, work.steps, work.score, work.recall, *self._sizes(), *place,
            **self._settings("drift_tables"), **self.numbers,
        )  # fmt: skip
        if matrix is not None:
            launch(
                drift_keys_kernel, (lists * chunks,),
                self.k, self.log_decay, self.document_start, matrix, work.terms, *keys, *self._sizes(), *place,
                **self._settings("drift_keys"), PRECISION=self.numbers["PRECISION"],
            )  # fmt: skip
        linked = max(first, 1)
        launch(
            drift_links_kernel, (lists * (first + chunks - linked),),
            *inputs, self.tau, work.terms, work.steps, work.score, *keys,
            *self._sizes(), linked, first + chunks - linked, self.ring,
            **self._settings("drift_links"), **self.numbers,
        )  # fmt: skip
        launch(
            drift_guess_kernel, (lists,),
            work.steps, self.newest, self.opened, work.entry, self.heads, *row,
            C=self.chunk, **tuning("drift_guess", self.k.device),
        )  # fmt: skip
        settings = self._settings("drift_states")
        launch(
            drift_states_kernel, (lists * cdiv(self.value_dim, settings["BV"]),),
            self.k, self.v, self.document_start, work.terms, work.key_end, self.newest, work.states,
            *self._sizes(), *row, **settings, PRECISION=self.numbers["PRECISION"],
        )  # fmt: skip
        launch(
            drift_entry_kernel, (lists * chunks,),
            *inputs, self.tau, work.terms, work.recall, work.key_open, self.newest, work.states, work.entry,
            work.entry_norm, *self._sizes(), *row, **self._settings("drift_entry"), **self.numbers,
        )  # fmt: skip
        launch(
            drift_walk_kernel, (lists,),
            *inputs, self.tau, work.terms, work.steps, *keys, self.newest, self.opened, work.states, work.entry,
            work.entry_norm, *self._sizes(), *row, **self._settings("drift_walk"), **self.numbers,
        )  # fmt: skip
        launch(
            drift_follow_kernel, (lists * chunks,),
            self.document_start, work.terms, work.steps, work.score, self.newest, work.entry,
            self.boundary.view(torch.uint8), self.score, self.tokens, self.heads, *row,
            C=self.chunk, **tuning("drift_follow", self.k.device),
        )  # fmt: skip
        if grads is not None:
            self._launch_gradients(matrix, row, *grads)

    def _launch_gradients(
        self, matrix: Tensor | None, row: tuple[int, int, int, int], grad_k: Tensor, grad_v: Tensor
    ) -> None:
        work, sizes = self.work, (self.tokens, self.heads, self.key_heads)
        inputs = (self.k, self.v, self.log_decay, self.beta, self.document_start)
        boundary = self.boundary.view(torch.uint8)
        grid = (self.batch * self.heads * row[1],)
        partials = torch.empty(*work.terms.shape[:3], 4, self.chunk, dtype=torch.float32, device=self.k.device)
        launch(
            drift_reads_kernel, grid,
            *inputs, work.terms, work.recall, work.key_open, work.key_end, self.newest, work.states, work.entry_norm,
            boundary, partials, grad_v, *sizes, *row, **self._settings("drift_reads"), **self.numbers,
        )  # fmt: skip
        launch(
            drift_gradients_kernel, grid,
            *inputs, matrix, work.terms, work.key_end, self.newest, work.states, boundary, partials, grad_k, grad_v,
            *sizes, *row, **self._settings("drift_gradients"), **self.numbers,
        )  # fmt: skip

    def _write_matrix(self, first: int, chunks: int) -> Tensor | None:
        """T [B, H, chunks, C, C] of the chunks from `first` on."""
        if self.beta is None:
            return None
        begin, end = first * self.chunk, (first + chunks) * self.chunk
        k, log_decay, beta, starts = (x[:, begin:end] for x in (self.k, self.log_decay, self.beta, self.document_start))
        return write_matrix_triton(k, log_decay, beta, starts - begin, self.chunk)

    def _sizes(self) -> tuple[int, int, int]:
        return self.tokens, self.heads, self.key_heads

    def _settings(self, kernel: str) -> dict[str, int]:
        """Dimensions and pinned settings, with no wider tile than the dimension it tiles."""
        settings = tuning(kernel, self.k.device)
        for tile, name in (("BK", "K"), ("BV", "V")):
            if tile in settings:
                settings[tile] = min(power_of_2(self.shape[name], 16), settings[tile])
                settings[name] = self.shape[name]
        return settings | {"C": self.chunk}
