"""The slots' states and their adjoints at every chunk edge, in Triton (docs/dla.md section 5).

    S'_j = sum_{i -> j} Gam S_i + K~_(l in j)^T V_(l in j)        D_i = Gam^T D'_j + Q~^T (w_i dO)

One program carries one block of value columns of one head from chunk to chunk. What tokens write to a slot does not
depend on the states and is put there first, in parallel over chunks. Edges are kept in float32 for a group of chunks at
a time: row c of `states` [B, H, rows, S, K, V] is the edge before the group's c-th chunk.

A slot that no token and no merge touches only fades, and by one factor for all its entries; where nothing is erased
(mamba2, and frozen slots) it is not written again but found by `version`, the row and slot where it last changed, and
`factor`, what has faded since.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.backbones.operators import Transition
from dla_kernels.launch import cdiv, dot_precision, launch, power_of_2, tuning
from dla_kernels.memory.table import SlotTable

FAR = tl.constexpr(2**31 - 1)


@triton.jit
def load_tile(pointer, rows, columns, stride, height, width):
    """[rows, columns] of a row-major matrix, zero outside height x width. Offsets within a tile fit 32 bits."""
    mask = (rows[:, None] < height) & (columns[None, :] < width)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_transposed(pointer, rows, columns, stride, height, width):
    """The transpose of `load_tile`: [columns, rows]."""
    mask = (rows[None, :] < height) & (columns[:, None] < width)
    return tl.load(pointer + rows[None, :] * stride + columns[:, None], mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, rows, columns, stride, height, width, block):
    """The part of `block` inside height x width, to a row-major matrix."""
    mask = (rows[:, None] < height) & (columns[None, :] < width)
    tl.store(pointer + rows[:, None] * stride + columns[None, :], block, mask=mask)


@triton.jit(do_not_specialize=["chunks", "edges", "group"])
def slot_versions_kernel(
    start, fill, decay, version, factor, chunks, edges, group,
    S: tl.constexpr, SP: tl.constexpr, FROZEN: tl.constexpr,
):  # fmt: skip
    """Where each slot was last written: [B, H, N+1, S], counted from its group's first row."""
    bh = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SP)
    inside = slot < S
    row = bh * edges * S
    before = tl.load(start + row + slot, mask=inside, other=FAR)
    before_next = tl.load(start + row + slot + 1, mask=slot + 1 < S, other=FAR)
    b_version = slot
    b_factor = tl.full([SP], 1.0, tl.float32)
    closed = tl.load(fill + bh * edges) - 1
    tl.store(version + row + slot, b_version, mask=inside)
    tl.store(factor + row + slot, b_factor, mask=inside)
    for n in range(1, edges):
        row += S
        now = tl.load(start + row + slot, mask=inside, other=FAR)
        now_next = tl.load(start + row + slot + 1, mask=slot + 1 < S, other=FAR)
        same = (now[:, None] == before[None, :]) & (now_next[:, None] == before_next[None, :])
        same = same & (slot[None, :] < closed) & (n % group > 0)
        kept = tl.sum(same.to(tl.int32), 1) > 0
        older = tl.sum(tl.where(same, b_version[None, :], 0), 1)
        faded = tl.sum(tl.where(same, b_factor[None, :], 0.0), 1)
        if not FROZEN:
            faded = faded * tl.load(decay + bh * chunks + n - 1)
        b_version = tl.where(kept, older, (n % group) * S + slot)
        b_factor = tl.where(kept, faded, 1.0)
        tl.store(version + row + slot, b_version, mask=inside)
        tl.store(factor + row + slot, b_factor, mask=inside)
        before = now
        before_next = now_next
        closed = tl.load(fill + bh * edges + n) - 1


@triton.jit(do_not_specialize=["first", "count", "chunks", "tokens", "heads", "rows"])
def write_chunks_kernel(
    key_end, values, start, fill, states, first, count, chunks, tokens, heads, rows,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """states[c + 1, j] = K~_(l in j)^T V_(l in j) for every slot j that chunk c writes to."""
    pid = tl.program_id(0).to(tl.int64)
    i_v = pid % tl.cdiv(V, BV)
    pid = pid // tl.cdiv(V, BV)
    i_k = pid % tl.cdiv(K, BK)
    pid = pid // tl.cdiv(K, BK)
    c = pid % count
    bh = pid // count
    n = first + c
    c0 = (n * C).to(tl.int32)
    last = tl.minimum(c0 + C, tokens)
    column_k = i_k * BK + tl.arange(0, BK)
    column_v = i_v * BV + tl.arange(0, BV)
    slot = tl.arange(0, SP)
    edge = (bh * (chunks + 1) + n + 1) * S
    live = tl.load(fill + bh * (chunks + 1) + n + 1)
    starts = tl.load(start + edge + slot, mask=slot < S, other=FAR)
    oldest = tl.maximum(tl.sum((starts <= c0).to(tl.int32), 0) - 1, 0)
    p_key = key_end + (bh * chunks + n) * C * K
    p_value = values + (((bh // heads) * tokens + n * C) * heads + bh % heads) * V
    for j in range(oldest, live):
        begin = tl.maximum(tl.load(start + edge + j), c0)
        end = tl.minimum(tl.load(start + edge + j + 1, mask=j + 1 < live, other=FAR), last)
        acc = tl.zeros([BK, BV], tl.float32)
        for r in range((begin - c0) // BT, tl.cdiv(end - c0, BT)):
            token = c0 + r * BT + tl.arange(0, BT)
            mine = (token >= begin) & (token < end)
            mask_k = mine[None, :] & (column_k[:, None] < K)
            b_key = tl.load(p_key + (token - c0)[None, :] * K + column_k[:, None], mask=mask_k, other=0.0)
            mask_v = mine[:, None] & (column_v[None, :] < V)
            o_value = (token - c0)[:, None] * (heads * V) + column_v[None, :]
            b_value = tl.load(p_value + o_value, mask=mask_v, other=0.0)
            acc = tl.dot(b_key, b_value.to(b_key.dtype), acc, input_precision=PRECISION)
        o_state = ((bh * rows + c + 1) * S + j) * K * V
        store_tile(states + o_state, column_k, column_v, V, K, V, acc)


@triton.jit
def transitioned(tiles, decay, first, second, PRECISION: tl.constexpr, N_K: tl.constexpr, BV: tl.constexpr):
    """decay * X - second (first X) of a matrix X given as tiles of rows."""
    size: tl.constexpr = first[0].shape[0]
    inner = tl.zeros([size, BV], tl.float32)
    for i in tl.static_range(N_K):
        inner = tl.dot(first[i], tiles[i].to(first[i].dtype), inner, input_precision=PRECISION)
    narrow = inner.to(first[0].dtype)
    out = ()
    for i in tl.static_range(N_K):
        out = out + (decay * tiles[i] - tl.dot(second[i], narrow, input_precision=PRECISION),)
    return out


@triton.jit(do_not_specialize=["first", "count", "chunks", "rows"])
def sweep_states_kernel(
    states, decay, erase, restore, start, fill, version, factor, first, count, chunks, rows,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BK: tl.constexpr,
    N_K: tl.constexpr, BV: tl.constexpr, FROZEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to row c + 1 what the slots of row c have become, chunk after chunk."""
    pid = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(K, BK * N_K)
    i_v = pid % tl.cdiv(V, BV)
    pid = pid // tl.cdiv(V, BV)
    k0 = (pid % parts) * BK * N_K
    bh = pid // parts
    column_v = i_v * BV + tl.arange(0, BV)
    slot = tl.arange(0, SP)
    token = tl.arange(0, C)
    p_state = states + bh * rows * S * K * V
    for c in range(count):
        tl.debug_barrier()  # rows written by other threads in the step before are read below
        n = first + c
        c0 = n * C
        old = (bh * (chunks + 1) + n) * S
        new = old + S
        olds = tl.load(start + old + slot, mask=slot < S, other=FAR)
        had = tl.load(fill + bh * (chunks + 1) + n)
        live = tl.load(fill + bh * (chunks + 1) + n + 1)
        b_decay = tl.load(decay + bh * chunks + n)
        erases = ()
        restores = ()
        if erase is not None:
            o_chunk = (bh * chunks + n) * C * K
            for t in tl.static_range(N_K):
                column = k0 + t * BK + tl.arange(0, BK)
                erases = erases + (load_tile(erase + o_chunk, token, column, K, C, K),)
                restores = restores + (load_transposed(restore + o_chunk, token, column, K, C, K),)
        for j in range(live):
            begin = tl.load(start + new + j)
            end = tl.load(start + new + j + 1, mask=j + 1 < live, other=FAR)
            fresh = begin < c0
            if version is not None:
                at = tl.load(version + new + j)
                # a group's last row is written in full: it is the next group's first
                fresh = fresh & ((at == (c + 1) * S + j) | (c + 1 == count))
            if fresh:
                low = tl.sum((olds < begin).to(tl.int32), 0)
                high = tl.sum((olds < end).to(tl.int32), 0)
                total = ()
                for _ in tl.static_range(N_K):
                    total = total + (tl.zeros([BK, BV], tl.float32),)
                stop = high
                if FROZEN:
                    stop = tl.minimum(high, had - 1)
                for i in range(low, stop):
                    o_old = tl.cast(c * S + i, tl.int64)
                    b_factor = 1.0
                    if version is not None:
                        o_old = tl.load(version + old + i).to(tl.int64)
                        b_factor = tl.load(factor + old + i)
                    more = ()
                    for t in tl.static_range(N_K):
                        column = k0 + t * BK + tl.arange(0, BK)
                        tile = load_tile(p_state + o_old * K * V, column, column_v, V, K, V)
                        more = more + (total[t] + b_factor * tile,)
                    total = more
                if FROZEN:
                    if (high == had) & (had > 0):
                        o_open = tl.load(version + old + had - 1).to(tl.int64)
                        opened = ()
                        for t in tl.static_range(N_K):
                            column = k0 + t * BK + tl.arange(0, BK)
                            opened = opened + (load_tile(p_state + o_open * K * V, column, column_v, V, K, V),)
                        if erase is not None:
                            opened = transitioned(opened, b_decay, erases, restores, PRECISION, N_K, BV)
                        else:
                            opened = (b_decay * opened[0],)
                        more = ()
                        for t in tl.static_range(N_K):
                            more = more + (total[t] + opened[t],)
                        total = more
                elif erase is not None:
                    total = transitioned(total, b_decay, erases, restores, PRECISION, N_K, BV)
                else:
                    total = (b_decay * total[0],)
                o_new = tl.cast((c + 1) * S + j, tl.int64) * K * V
                for t in tl.static_range(N_K):
                    column = k0 + t * BK + tl.arange(0, BK)
                    tile = total[t]
                    if end > c0:
                        tile += load_tile(p_state + o_new, column, column_v, V, K, V)
                    store_tile(p_state + o_new, column, column_v, V, K, V, tile)


@triton.jit(do_not_specialize=["first", "count", "chunks", "tokens", "heads", "rows"])
def sweep_adjoints_kernel(
    adjoints, d_out, query, query_open, weights, decay, erase, restore, start, fill,
    first, count, chunks, tokens, heads, rows,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BK: tl.constexpr,
    N_K: tl.constexpr, BV: tl.constexpr, FROZEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Row c of `adjoints` from row c + 1 and what chunk c reads, chunk before chunk."""
    pid = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(K, BK * N_K)
    i_v = pid % tl.cdiv(V, BV)
    pid = pid // tl.cdiv(V, BV)
    k0 = (pid % parts) * BK * N_K
    bh = pid // parts
    column_v = i_v * BV + tl.arange(0, BV)
    slot = tl.arange(0, SP)
    token = tl.arange(0, C)
    p_adjoint = adjoints + bh * rows * S * K * V
    p_out = d_out + ((bh // heads) * tokens * heads + bh % heads) * V
    for back in range(count):
        tl.debug_barrier()
        c = count - 1 - back
        n = first + c
        o_chunk = (bh * chunks + n) * C * K
        old = (bh * (chunks + 1) + n) * S
        news = tl.load(start + old + S + slot, mask=slot < S, other=FAR)
        had = tl.load(fill + bh * (chunks + 1) + n)
        b_decay = tl.load(decay + bh * chunks + n)
        p_chunk = p_out + tl.cast(n * C, tl.int64) * heads * V
        b_out = load_tile(p_chunk, token, column_v, heads * V, tokens - n * C, V).to(tl.float32)
        queries = ()
        erases = ()
        restores = ()
        for t in tl.static_range(N_K):
            column = k0 + t * BK + tl.arange(0, BK)
            queries = queries + (load_transposed(query + o_chunk, token, column, K, C, K),)
            if erase is not None:
                erases = erases + (load_transposed(erase + o_chunk, token, column, K, C, K),)
                restores = restores + (load_tile(restore + o_chunk, token, column, K, C, K),)
        stop = had
        if FROZEN:
            stop = had - 1
        for i in range(stop):
            into = tl.sum((news <= tl.load(start + old + i)).to(tl.int32), 0) - 1
            o_new = tl.cast((c + 1) * S + into, tl.int64) * K * V
            height = tl.where(into >= 0, K, 0)  # a slot whose document has ended has no later adjoint
            tiles = ()
            for t in tl.static_range(N_K):
                column = k0 + t * BK + tl.arange(0, BK)
                tiles = tiles + (load_tile(p_adjoint + o_new, column, column_v, V, height, V),)
            if not FROZEN:
                if erase is not None:
                    tiles = transitioned(tiles, b_decay, restores, erases, PRECISION, N_K, BV)
                else:
                    tiles = (b_decay * tiles[0],)
            weight = tl.load(weights + ((bh * chunks + n) * S + i) * C + token)
            read = (weight[:, None] * b_out).to(queries[0].dtype)
            o_old = tl.cast(c * S + i, tl.int64) * K * V
            for t in tl.static_range(N_K):
                column = k0 + t * BK + tl.arange(0, BK)
                tile = tl.dot(queries[t], read, tiles[t], input_precision=PRECISION)
                store_tile(p_adjoint + o_old, column, column_v, V, K, V, tile)
        if FROZEN:
            if had > 0:
                i_open = had - 1
                into = tl.sum((news <= tl.load(start + old + i_open)).to(tl.int32), 0) - 1
                o_new = tl.cast((c + 1) * S + into, tl.int64) * K * V
                height = tl.where(into >= 0, K, 0)
                tiles = ()
                for t in tl.static_range(N_K):
                    column = k0 + t * BK + tl.arange(0, BK)
                    tiles = tiles + (load_tile(p_adjoint + o_new, column, column_v, V, height, V),)
                if erase is not None:
                    tiles = transitioned(tiles, b_decay, restores, erases, PRECISION, N_K, BV)
                else:
                    tiles = (b_decay * tiles[0],)
                weight = tl.load(weights + ((bh * chunks + n) * S + i_open) * C + token)
                read = (weight[:, None] * b_out).to(queries[0].dtype)
                o_old = tl.cast(c * S + i_open, tl.int64) * K * V
                for t in tl.static_range(N_K):
                    column = k0 + t * BK + tl.arange(0, BK)
                    b_query = load_transposed(query_open + o_chunk, token, column, K, C, K)
                    tile = tl.dot(b_query, read, tiles[t], input_precision=PRECISION)
                    store_tile(p_adjoint + o_old, column, column_v, V, K, V, tile)


def slot_versions(table: SlotTable, decay: Tensor, group: int, *, frozen: bool) -> tuple[Tensor, Tensor]:
    """(version int32, factor float32) [B, H, N+1, S] of slots that are not written again while nothing touches them.

    decay [B, H, N] is what a chunk leaves of a closed slot; `group` chunks are swept at a time.
    """
    version, factor = torch.empty_like(table.start), torch.empty_like(table.start, dtype=torch.float32)
    batch, heads, edges, slots = table.start.shape
    launch(
        slot_versions_kernel, (batch * heads,),
        table.start, table.fill, decay, version, factor, edges - 1, edges, group,
        S=slots, SP=power_of_2(slots), FROZEN=frozen, **tuning("slot_versions", decay.device),
    )  # fmt: skip
    return version, factor


class Group:
    """Chunks first .. first + count of a row, swept together: the buffers' rows 0 .. count are their edges."""

    def __init__(
        self,
        table: SlotTable,
        transition: Transition,
        versions: tuple[Tensor, Tensor] | None,
        first: int,
        count: int,
        *,
        frozen: bool,
    ) -> None:
        self.table, self.transition, self.frozen = table, transition, frozen
        self.version = None if versions is None else versions[0]
        self.factor = None if versions is None else versions[1]
        self.first, self.count = first, count

    def sweep_states(self, states: Tensor, key_end: Tensor, values: Tensor) -> None:
        """Fill rows 1 .. count of states [B, H, rows, S, K, V] from row 0; key_end [B,H,N,C,K], values [B,T,H,V]."""
        table = self.table
        batch, heads, rows, slots, key_dim, value_dim = states.shape
        sizes = {"C": table.chunk, "K": key_dim, "V": value_dim, "S": slots, "SP": power_of_2(slots)}
        precision = dot_precision(key_end.dtype)
        settings = fit(tuning("write_chunks", states.device), key_dim, value_dim)
        settings["BT"] = min(settings["BT"], table.chunk)
        blocks = cdiv(key_dim, settings["BK"]) * cdiv(value_dim, settings["BV"])
        launch(
            write_chunks_kernel, (batch * heads * self.count * blocks,),
            key_end, values, table.start, table.fill, states,
            self.first, self.count, table.chunks, table.tokens, heads, rows,
            PRECISION=precision, **sizes, **settings,
        )  # fmt: skip
        settings, blocks = self._blocks("sweep_states", states)
        launch(
            sweep_states_kernel, (batch * heads * blocks,),
            states, self.transition.decay, self.transition.erase, self.transition.restore,
            table.start, table.fill, self.version, self.factor, self.first, self.count, table.chunks, rows,
            FROZEN=self.frozen, PRECISION=precision, **sizes, **settings,
        )  # fmt: skip

    def sweep_adjoints(
        self, adjoints: Tensor, d_out: Tensor, query: Tensor, query_open: Tensor | None, weights: Tensor
    ) -> None:
        """Fill rows 0 .. count - 1 of adjoints [B, H, rows, S, K, V] from row count.

        d_out [B,T,H,V], query [B,H,N,C,K] (query_open: that of the open slot, where frozen), weights [B,H,N,S,C].
        """
        table = self.table
        batch, heads, rows, slots, key_dim, value_dim = adjoints.shape
        settings, blocks = self._blocks("sweep_adjoints", adjoints)
        launch(
            sweep_adjoints_kernel, (batch * heads * blocks,),
            adjoints, d_out, query, query_open, weights,
            self.transition.decay, self.transition.erase, self.transition.restore, table.start, table.fill,
            self.first, self.count, table.chunks, table.tokens, heads, rows,
            C=table.chunk, K=key_dim, V=value_dim, S=slots, SP=power_of_2(slots), FROZEN=self.frozen,
            PRECISION=dot_precision(query.dtype), **settings,
        )  # fmt: skip

    def _blocks(self, kernel: str, states: Tensor) -> tuple[dict[str, int], int]:
        """Settings and programs a head: erasing needs all key rows in one program, fading does not."""
        key_dim, value_dim = states.shape[-2:]
        erasing = self.transition.erase is not None
        settings = fit(tuning(f"{kernel}_erasing" if erasing else kernel, states.device), key_dim, value_dim)
        settings["N_K"] = cdiv(key_dim, settings["BK"]) if erasing else 1
        return settings, cdiv(key_dim, settings["BK"] * settings["N_K"]) * cdiv(value_dim, settings["BV"])


def fit(settings: dict[str, int], key_dim: int, value_dim: int) -> dict[str, int]:
    """Blocks no larger than the dimensions need."""
    if "BK" in settings:
        settings["BK"] = min(settings["BK"], power_of_2(key_dim, 16))
    settings["BV"] = min(settings["BV"], power_of_2(value_dim, 16))
    return settings
