"""Decoder language model: embedding, residual blocks, final norm, head; whole sequences or one token at a time.

Parameters are float32 and activations `compute_dtype`. With `recompute` each block's activations are made again in
backward, its memory plan is not (see recurrent.py). Build under `torch.device("meta")`, then `init.init_weights`.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dla_train.config import MemoryConfig, ModelConfig
from dla_train.layout_rules import context_problems, refuse
from dla_train.models.block import Block, enter
from dla_train.models.context import own_time
from dla_train.models.linear import Embedding, Linear, RMSNorm
from dla_train.models.loss import next_token_loss, next_token_nats
from dla_train.models.mixer import Cache, Documents, Mixer, Observer, PlanRecord
from dla_train.models.recurrent import RecurrentMixer
from dla_train.parallel.axes import Axes
from dla_train.parallel.sections import local_model, sum_partial_gradients
from dla_train.parallel.vocab import vocab_parallel_loss, vocab_parallel_nats


@dataclass(frozen=True)
class LanguageModelOutput:
    """What a forward returns."""

    logits: Tensor
    """[B, T, vocab] in the compute dtype: scores of the next token."""
    caches: list[Cache] | None
    """One cache per layer after the last token, where asked for."""


class LanguageModel(nn.Module):
    """Token ids to next-token logits."""

    def __init__(
        self,
        model: ModelConfig,
        memory: MemoryConfig,
        *,
        compute_dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        device: torch.device | str | None = None,
        axes: Axes | None = None,
    ) -> None:
        """Parameters are left uninitialised; `device` is where they are made (default: the current default device).

        axes: the ranks that share this model (default: one). Raises ConfigError where it does not divide over them.
        """
        super().__init__()
        self.axes = axes = Axes.single() if axes is None else axes
        refuse(context_problems(model, axes.tensor.size, axes.context.size).values())
        rows = local_model(model, axes.tensor.size).vocab_size
        self.model_config, self.memory_config = model, memory
        self.compute_dtype, self.recompute = compute_dtype, recompute
        with torch.device(device if device is not None else torch.get_default_device()):
            self.embedding = Embedding(model.vocab_size, model.width, axes.tensor)
            self.blocks = nn.ModuleList(
                Block(model, memory, axes, compute_dtype=compute_dtype) for _ in range(model.num_layers)
            )
            self.final_norm = RMSNorm(model.width, model.norm_eps)
            self.head = None if model.tie_embeddings else Linear(model.width, rows)
        self.mark_parameters()

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        gate_temperature: float | None = None,
        caches: list[Cache] | None = None,
        return_caches: bool = False,
        observe: Observer | None = None,
        positions: Tensor | None = None,
    ) -> LanguageModelOutput:
        """tokens [B, T] int64 -> logits [B, T, vocab].

        Under tensor and context parallelism every rank is given the whole rows and returns the logits of its run of
        their tokens and its rows of the vocabulary: `token_loss` takes them.

        cu_seqlens [M+1]: document offsets into the flattened tokens, row edges included; None is one document a
        row. gate_temperature: of soft boundaries in training mode (default `memory.gate_temperature`); evaluation
        is always hard. caches: continue the first document of each row (use the returned ones afterwards).
        observe: called with every recurrent layer's index and what its memory did, once, in the order of the layers.
        positions [N] int64: tokens b * T + t whose logits are wanted, [N, vocab]; the head is the cost of N tokens.
        Raises ValueError for tokens of another shape or type, for bad offsets, and for positions where ranks divide
        the time.
        """
        if positions is not None and (self.axes.sequence or self.axes.context.size > 1):
            raise ValueError("positions needs whole rows on every rank: parallel.sequence=false, parallel.context=1")
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(f"tokens has shape {list(tokens.shape)} and dtype {tokens.dtype}; it must be [B, T] int64")
        temperature = self.memory_config.gate_temperature if gate_temperature is None else gate_temperature
        seen = caches[0].position if caches else None
        batch, length = tokens.shape
        documents = Documents.of(batch, length, cu_seqlens, seen=seen, device=tokens.device)
        x = self.embedding(own_time(tokens, self.axes), dtype=self.compute_dtype, scatter_time=self.axes.sequence)
        after: list[Cache] = []
        records = [
            PlanRecord(observer=None if observe is None else functools.partial(observe, layer))
            for layer in range(len(self.blocks))
        ]
        for index, (block, record) in enumerate(zip(self._blocks(), records, strict=True)):
            cache = caches[index] if caches else None
            x, new_cache = self._run(block, x, documents, record, temperature, cache, return_caches)
            if new_cache is not None:
                after.append(new_cache)
        if positions is not None:
            x = x.flatten(0, 1)[positions]
        return LanguageModelOutput(self._logits(x, self.axes), after if return_caches else None)

    def token_loss(self, logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """`next_token_loss` of logits [B, T, rows] as `forward` gives them and the targets [B, T] of the whole rows.

        Sums over this context rank's tokens, the same on every tensor rank.
        """
        targets = own_time(targets, self.axes)
        if self.axes.tensor.size == 1:
            return next_token_loss(logits, targets, z_loss)
        return vocab_parallel_loss(logits, targets, self.axes.tensor, self.model_config.vocab_size, z_loss)

    @torch.no_grad()
    def token_nats(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Nats of every target of this context rank's tokens, [B, T'] float32, 0 where there is none; no gradient.

        Takes what `token_loss` takes; the same on every tensor rank.
        """
        targets = own_time(targets, self.axes)
        if self.axes.tensor.size == 1:
            return next_token_nats(logits, targets)
        return vocab_parallel_nats(logits, targets, self.axes.tensor, self.model_config.vocab_size)

    def mark_parameters(self) -> None:
        """Have partial gradients summed over the tensor axis, for the parameters the model has now."""
        sum_partial_gradients(self, self.model_config, self.axes.tensor, sequence=self.axes.sequence)

    def step(self, tokens: Tensor, caches: list[Cache]) -> Tensor:
        """Decode one token a sequence: tokens [B] int64 -> logits [B, vocab]; `caches` are updated in place."""
        if self.axes.context.size > 1:
            raise ValueError("decoding needs parallel.context=1: it divides heads over parallel.tensor alone")
        whole = dataclasses.replace(self.axes, sequence=False)
        x = self.embedding(tokens, dtype=self.compute_dtype)
        for block, cache in zip(self._blocks(), caches, strict=True):
            x = block.step(x, cache)
        return self._logits(x, whole)

    def empty_caches(self, batch: int, max_tokens: int, *, device: torch.device | None = None) -> list[Cache]:
        """Caches before a first token; only attention's depend on `max_tokens`. Default device: the parameters'."""
        device = device if device is not None else self.embedding.weight.device
        return [block.mixer.empty_cache(batch, max_tokens, device=device) for block in self._blocks()]

    def memory_statistics(self) -> Tensor:
        """[layers, H, 3] float64 since the last reset: boundaries, decisions, and the sum over decisions of live slots.

        Every token decides but a document's first, so padding does not. Zeros for attention. This rank's tokens only.
        """
        heads = self.model_config.num_heads // self.axes.tensor.size
        empty = torch.zeros(heads, 3, dtype=torch.float64, device=self.embedding.weight.device)
        return torch.stack([m.statistics if isinstance(m, RecurrentMixer) else empty for m in self._mixers()]).clone()

    def reset_memory_statistics(self) -> None:
        """Start counting anew."""
        for mixer in self._mixers():
            if isinstance(mixer, RecurrentMixer):
                mixer.statistics.zero_()

    def control_tau(self, statistics: Tensor) -> None:
        """Move every head's tau by `tau_step` towards the target boundary rate, given [layers, H, 3] summed over ranks.

        No-op unless `memory.tau_control` is `rate`. The moved tau is a buffer and part of the checkpoint.
        """
        for mixer, counted in zip(self._mixers(), statistics, strict=True):
            if isinstance(mixer, RecurrentMixer):
                mixer.control_tau(counted)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _mixers(self) -> list[Mixer]:
        return [block.mixer for block in self._blocks()]

    def _run(
        self,
        block: nn.Module,
        x: Tensor,
        documents: Documents,
        record: PlanRecord,
        temperature: float,
        cache: Cache | None,
        return_cache: bool,
    ) -> tuple[Tensor, Cache | None]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x, documents, record, temperature, cache, return_cache, use_reentrant=False)
        return block(x, documents, record, temperature, cache, return_cache)

    def _logits(self, x: Tensor, axes: Axes) -> Tensor:
        x = enter(self.final_norm(x), axes)
        return self.embedding(x, unembed=True) if self.head is None else self.head(x)
