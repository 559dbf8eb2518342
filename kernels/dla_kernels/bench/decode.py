"""Decoding: latency of one dla_step and bytes of its cache after contexts of growing length.

A cache is filled by prefill, carried from one context length to the next. Contexts are then timed in turn, each step on
a token of its own. A CUDA graph of the step is what a server replays; the eager step shows what the host adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dla_kernels import MergeCache, dla_attention, dla_step, plan_memory
from dla_kernels.bench.inputs import CAPACITY_RULE, TAU, LayerInputs, Shape, layer_inputs
from dla_kernels.bench.layers import SHARPNESS
from dla_kernels.bench.measure import Stopwatch, outcome, summary

PIECE_TOKENS = 16384
"""Most tokens of one prefill call; the cache carries over."""


def filled_caches(
    shape: Shape, capacity: int, contexts: list[int], dtype: torch.dtype, device: torch.device, backend: str | None
) -> Iterator[tuple[int, MergeCache]]:
    """(context, cache after that many tokens) of one sequence, for contexts in rising order."""
    inputs = layer_inputs(shape, 1, contexts[-1], dtype=dtype, device=device, gradients=False)
    cache, begin = None, 0
    for context in contexts:
        while begin < context:
            end = min(context, begin + PIECE_TOKENS)
            cache = prefill(shape, inputs.tokens(begin, end), capacity, cache, backend)
            begin = end
        assert cache is not None
        yield context, cache.clone()


@torch.no_grad()
def prefill(
    shape: Shape, inputs: LayerInputs, capacity: int, cache: MergeCache | None, backend: str | None
) -> MergeCache:
    """The cache after more tokens, with routing keys for content reads."""
    plan = plan_memory(
        *inputs.keys, tau=TAU, capacity=capacity, capacity_rule=CAPACITY_RULE, cache=cache, backend=backend
    )
    weights = torch.ones(*inputs.v.shape[:3], capacity, device=inputs.v.device)
    read = dla_attention(
        inputs.q,
        *inputs.keys,
        read_weights=weights,
        plan=plan,
        scale=shape.scale,
        routing_keys=inputs.k,
        cache=cache,
        return_cache=True,
        backend=backend,
    )
    assert not isinstance(read, Tensor)
    return read[1]


def repeated(cache: MergeCache, batch: int) -> MergeCache:
    """The same sequence `batch` times."""
    fields = {f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)}
    many = {name: x.repeat(batch, *[1] * (x.dim() - 1)) for name, x in fields.items() if x is not None}
    return dataclasses.replace(cache, **many)


class Decoder:
    """One dla_step on buffers that keep their place, as a graph needs them."""

    def __init__(self, shape: Shape, cache: MergeCache, tokens: LayerInputs, backend: str | None = None) -> None:
        """tokens: what is decoded, [B, steps, ...]; begins anew after the last."""
        self.cache, self._tokens, self._next = cache, tokens, 0
        self._buffers = [x[:, 0].clone() for x in tokens.tensors]
        self.next_token()
        device, batch = cache.states.device, cache.states.shape[0]
        weights = torch.ones(batch, shape.heads, cache.slots, device=device)
        gain, sharpness = torch.ones(shape.heads, device=device), torch.full((shape.heads,), SHARPNESS, device=device)

        def step() -> Tensor:
            q, k, v, log_decay, *beta = self._buffers
            return dla_step(
                q,
                k,
                v,
                log_decay,
                beta[0] if beta else None,
                read_weights=weights,
                tau=TAU,
                cache=cache,
                capacity_rule=CAPACITY_RULE,
                scale=shape.scale,
                rho=q,
                kappa=k,
                gain=gain,
                sharpness=sharpness,
                backend=backend,
            )

        self.step: Callable[[], object] = step

    def next_token(self) -> None:
        """Put the next token where `step` reads it."""
        for buffer, x in zip(self._buffers, self._tokens.tensors, strict=True):
            buffer.copy_(x[:, self._next % x.shape[1]])
        self._next += 1

    def captured(self) -> Callable[[], object]:
        """`step` as a CUDA graph. Raises RuntimeError where it cannot be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


@torch.no_grad()
def measure_decode(
    shape: Shape,
    capacity: int,
    contexts: list[int],
    batches: list[int],
    steps: int,
    stopwatch: Stopwatch,
    *,
    dtype: torch.dtype,
    backend: str | None,
) -> list[dict[str, Any]]:
    """One record per batch and context: bytes, and latencies `eager` and `graph` of one layer in milliseconds."""
    device = stopwatch.device
    caches = dict(filled_caches(shape, capacity, contexts, dtype, device, backend))
    records = []
    for batch in batches:
        tokens = layer_inputs(shape, batch, steps + 2, dtype=dtype, device=device, gradients=False)
        decoders = {
            context: Decoder(shape, repeated(cache, batch), tokens, backend) for context, cache in caches.items()
        }
        eager = _latencies({context: decoder.step for context, decoder in decoders.items()}, decoders, steps, stopwatch)
        graphs, why = _graphs(decoders, device)
        replayed = _latencies(graphs, decoders, steps, stopwatch) if graphs else {}
        for context, decoder in decoders.items():
            records.append(
                {
                    "batch": batch,
                    "context": context,
                    "bytes": decoder.cache.nbytes,
                    "live_slots": float(decoder.cache.fill.float().mean()),
                    "eager": eager[context],
                    "graph": replayed.get(context),
                    "graph_state": why,
                }
            )
    return records


def _latencies(
    steps: dict[int, Callable[[], object]], decoders: dict[int, Decoder], count: int, stopwatch: Stopwatch
) -> dict[int, dict[str, Any]]:
    laps: dict[int, list[float]] = {context: [] for context in steps}
    for number in range(count + 2):
        for context, step in steps.items():
            decoders[context].next_token()
            milliseconds = stopwatch.milliseconds(step)
            if number >= 2:
                laps[context].append(milliseconds)
    return {context: summary(rounds) for context, rounds in laps.items()}


def _graphs(decoders: dict[int, Decoder], device: torch.device) -> tuple[dict[int, Callable[[], object]], str]:
    """The steps as graphs, all or none, and why there are none."""
    if device.type != "cuda":
        return {}, "not measured: graphs need a CUDA device"
    graphs: dict[int, Callable[[], object]] = {}

    def capture() -> None:
        for context, decoder in decoders.items():
            graphs[context] = decoder.captured()

    status, detail = outcome(capture)
    return (graphs, "captured") if status == "ok" else ({}, f"{status}: {detail}")
