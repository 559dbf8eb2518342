"""A recurrent mixer: backbone x memory policy. The only place in the model where memory operations are called.

Two backbones and four policies are two modules and four names, never eight classes. The plan (which slot holds
what, when) is decided once per forward and kept in the caller's `PlanRecord`: a recomputed forward reads it back,
since a decision made again from recomputed activations need not fall alike, and would count its statistics twice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dla_kernels import (
    MemoryPlan,
    MergeCache,
    boundary_gate,
    boundary_score,
    dla_attention,
    dla_step,
    plan_memory,
)
from dla_train.config import MemoryConfig, ModelConfig
from dla_train.models.backbone import Backbone, Projected, StateInputs, exchange_projected
from dla_train.models.context import to_time
from dla_train.models.gated_deltanet import GatedDeltaNet
from dla_train.models.linear import wide_dtype
from dla_train.models.mamba2 import Mamba2
from dla_train.models.memory_reads import CONTROLLED_TAU_RANGE, MemoryReader, RoutingTerms
from dla_train.models.mixer import Documents, MemoryReading, PlanRecord
from dla_train.parallel.axes import Axes
from dla_train.parallel.sections import local_model

BACKBONES: dict[str, type[GatedDeltaNet] | type[Mamba2]] = {"mamba2": Mamba2, "gated_deltanet": GatedDeltaNet}


class RecurrentMixer(nn.Module):
    """Token mixer whose bounded memory is a list of recurrent states per head."""

    statistics: Tensor

    def __init__(self, model: ModelConfig, memory: MemoryConfig, axes: Axes, *, compute_dtype: torch.dtype) -> None:
        """Sizes are this rank's part of the whole `model`."""
        super().__init__()
        self.backbone: Backbone = BACKBONES[model.backbone](model, axes)
        model = local_model(model, axes.tensor.size)
        self.model, self.memory, self.context = model, memory, axes.context
        self.dtype = compute_dtype
        self.reader = MemoryReader(model, memory, axes.context)
        self.register_buffer("statistics", torch.zeros(model.num_heads, 3, dtype=torch.float64), persistent=False)

    def forward(
        self,
        hidden: Tensor,
        documents: Documents,
        record: PlanRecord,
        *,
        gate_temperature: float,
        cache: MergeCache | None = None,
        return_cache: bool = False,
    ) -> tuple[Tensor, MergeCache | None]:
        """hidden [B, T, D] -> (output [B, T, D], cache after the last token or None). `cache` is left as it is.

        Under context parallelism hidden and output hold this rank's tokens, `documents` all, caches this rank's heads.
        """
        projected, of_heads, inputs = self._state_inputs(hidden, documents.positions, cache)
        if record.plan is None:
            record.tau = self._tau()
            record.plan = self._decide(inputs, documents, record.tau, cache)
            self._count(record.plan)
        plan = record.plan
        weights, routing = self.reader(hidden, inputs, plan, cache)
        gates = self._gates(inputs, plan, gate_temperature)
        self._show(record, weights, gates, routing, cache)
        q, k, v, log_decay, beta = inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.beta
        read = dla_attention(
            q,
            k,
            v,
            log_decay,
            beta,
            read_weights=weights,
            plan=plan,
            closed_slots=self.memory.closed_slots,
            scale=self.backbone.scale,
            gates=gates,
            routing_keys=routing.kappa if routing is not None else None,
            cache=cache,
            return_cache=return_cache,
            backend=self.reader.backend,
            chunk_size=self.reader.chunk,
        )
        read, after = (read, None) if isinstance(read, Tensor) else read
        if after is not None:
            after.conv = self._window(of_heads, routing, cache)
        skip = None if inputs.skip is None else to_time(inputs.skip, self.context)
        return self.backbone.output(to_time(read, self.context), skip, projected), after

    def step(self, hidden: Tensor, cache: MergeCache) -> Tensor:
        """One token: hidden [B, D] -> [B, D]; `cache` is updated in place. Boundaries are hard."""
        hidden = hidden[:, None]
        positions = cache.position[:, None].clone()
        projected, _, inputs = self._state_inputs(hidden, positions, cache)
        routing = None if self.reader.routing is None else self.reader.routing(hidden, inputs, positions, cache)
        read = dla_step(
            inputs.q[:, 0],
            inputs.k[:, 0],
            inputs.v[:, 0],
            inputs.log_decay[:, 0],
            inputs.beta[:, 0] if inputs.beta is not None else None,
            read_weights=self.reader.slot_weights(hidden, positions)[:, 0],
            tau=self._tau(),
            cache=cache,
            policy=self.memory.policy,
            drift=self.memory.drift,
            capacity_rule=self.memory.capacity_rule,
            interval=self.memory.interval_tokens,
            closed_slots=self.memory.closed_slots,
            scale=self.backbone.scale,
            rho=routing.rho[:, 0] if routing is not None else None,
            kappa=routing.kappa[:, 0] if routing is not None else None,
            gain=routing.gain if routing is not None else None,
            sharpness=routing.sharpness if routing is not None else None,
            backend=self.reader.backend,
        )
        window = self._window(projected, routing, cache)
        if window is not None and cache.conv is not None:
            cache.conv.copy_(window)
        return self.backbone.output(read[:, None], inputs.skip, projected)[:, 0]

    def empty_cache(self, batch: int, max_tokens: int, *, device: torch.device | None = None) -> MergeCache:
        """The memory before a sequence's first token; its size does not depend on `max_tokens`."""
        model, conv = self.model, self.backbone.conv
        return MergeCache.empty(
            batch,
            model.num_heads // self.context.size,
            self.reader.capacity,
            model.key_dim,
            model.value_dim,
            routing_dim=self.reader.routing_dim,
            conv_channels=sum(self._own_conv_channels()),
            conv_width=conv.width,
            dtype=wide_dtype(self.dtype),
            device=device,
        )

    def _own_conv_channels(self) -> list[int]:
        """Convolved channels of the heads a context rank has inside the mixer; a single head is every rank's."""
        conv, routing = self.backbone.conv, self.reader.routing
        sizes = zip(conv.sizes, self.backbone.conv_dims, strict=True) if conv.width else ()
        own = [size if size == dim else size // self.context.size for size, dim in sizes]
        return own + (routing.own_conv_channels if routing is not None else [])

    def _window(self, of_heads: Projected, routing: RoutingTerms | None, cache: MergeCache | None) -> Tensor | None:
        """What the convolutions need of the tokens so far, [B, C, W-1]: the backbone's channels, then routing's."""
        inputs = of_heads.conv_inputs + (routing.conv_inputs if routing is not None else ())
        return self.backbone.conv.window(inputs, cache.conv if cache is not None else None)

    @torch.no_grad()
    def control_tau(self, statistics: Tensor) -> None:
        """Move each head's tau one step towards the target boundary rate, given [H, 3] counted as in `statistics`.

        A head that saw no tokens stays. No-op unless `tau_control` is `rate`.
        """
        if self.reader.tau is None or self.memory.tau_control != "rate":
            return
        boundaries, tokens = statistics[:, 0], statistics[:, 1]
        error = torch.where(tokens > 0, boundaries / tokens.clamp_min(1) - self.memory.target_boundary_rate, 0)
        value = self.reader.tau.value
        value.add_(self.memory.tau_step * error.sign().to(value)).clamp_(*CONTROLLED_TAU_RANGE)

    def _state_inputs(
        self, hidden: Tensor, positions: Tensor, cache: MergeCache | None
    ) -> tuple[Projected, Projected, StateInputs]:
        """Projections of this rank's tokens, of its heads of all tokens, and what the memory of its heads consumes."""
        projected = self.backbone.project(hidden)
        of_heads = exchange_projected(projected, self.backbone, self.context)
        channels = sum(x.shape[-1] for x in of_heads.conv_inputs)
        history = cache.conv[:, :channels] if cache is not None and cache.conv is not None else None
        mixed = self.backbone.conv(of_heads.conv_inputs, positions, history)
        return projected, of_heads, self.backbone.state_inputs(mixed, of_heads)

    @torch.no_grad()
    def _tau(self) -> Tensor | float:
        return self.reader.own_tau() if self.reader.tau is not None else self.memory.tau

    @torch.no_grad()
    def _decide(
        self, inputs: StateInputs, documents: Documents, tau: Tensor | float, cache: MergeCache | None
    ) -> MemoryPlan:
        memory = self.memory
        # What the planner saves for its own score gradients is not the block's: a recomputation, which does not
        # plan, must find the same saved tensors as the first forward.
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return plan_memory(
                inputs.k,
                inputs.v,
                inputs.log_decay,
                inputs.beta,
                tau=tau,
                capacity=self.reader.capacity,
                policy=memory.policy,
                drift=memory.drift,
                capacity_rule=memory.capacity_rule,
                interval=memory.interval_tokens,
                cu_seqlens=None if documents.one_per_row else documents.cu_seqlens,
                cache=cache,
                chunk_size=self.reader.chunk,
                score_gradients=self.training and memory.gated,
                backend=self.reader.backend,
            )

    def _gates(self, inputs: StateInputs, plan: MemoryPlan, temperature: float) -> Tensor | None:
        """Soft or straight-through boundaries [B, T, H] in training, None (hard) otherwise and for fixed partitions."""
        if not (self.training and self.memory.gated):
            return None
        score = boundary_score(inputs.k, inputs.v, plan)
        return boundary_gate(score, plan, tau=self.reader.own_tau(), temperature=temperature, gate=self.memory.gate)

    @torch.no_grad()
    def _show(
        self,
        record: PlanRecord,
        weights: Tensor,
        gates: Tensor | None,
        routing: RoutingTerms | None,
        cache: MergeCache | None,
    ) -> None:
        """Call the record's observer, if there is one, and let go of it."""
        observer, record.observer = record.observer, None
        if observer is None or record.plan is None:
            return
        observer(
            MemoryReading(
                plan=record.plan,
                weights=weights.detach(),
                gates=None if gates is None else gates.detach(),
                carried_gates=None if cache is None else cache.gates,
                tau=record.tau if isinstance(record.tau, Tensor) else None,
                gain=None if routing is None else routing.gain.detach(),
                sharpness=None if routing is None else routing.sharpness.detach(),
                first_head=self.context.rank * self.reader.heads,
            )
        )

    @torch.no_grad()
    def _count(self, plan: MemoryPlan) -> None:
        """Add to [H, 3]: boundaries, decisions, live slots at decisions.

        A document's first token decides nothing and is not counted, so neither is padding, of which each is a document.
        """
        decides = (plan.positions > 0)[..., None]
        own = self.statistics.chunk(self.context.size)[self.context.rank]
        decisions = decides.sum().expand(len(own))
        counted = [(plan.boundary & decides).sum((0, 1)), decisions, (plan.live_slots() * decides).sum((0, 1))]
        own += torch.stack([c.to(own) for c in counted], dim=-1)
