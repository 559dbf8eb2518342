"""The learned side of a memory policy: drift threshold, read weights, content routing (docs/dla.md, section 2).

`MemoryReader` is the same for every backbone and policy. Two parametrisations a reader would ask about:
- A slot weight is softplus(W x + bias + log(e - 1)) with W = bias = 0 at the start: exactly 1, so a fresh layer is its
  single-state backbone.
- The content gain must be able to start at exactly 0, stay non-negative and still learn. No smooth map of a parameter
  does all three (0 is its minimum, so its slope there is 0): the gain is the parameter itself, and the optimizer puts
  it back on 0 after an update that went below (optim.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_kernels import MemoryPlan, MergeCache, content_read_weights, l2_normalize, log_linear_levels, slot_affinity
from dla_train.config import TAU_RANGE, MemoryConfig, ModelConfig
from dla_train.models.backbone import ShortConv, StateInputs, own_heads, split_dims, split_heads
from dla_train.models.context import to_heads
from dla_train.models.linear import Linear, exact, no_decay, wide_dtype
from dla_train.parallel.axes import Axis

SOFTPLUS_ONE = math.log(math.e - 1)
"""softplus(SOFTPLUS_ONE) == 1, exactly in float32."""
CONTROLLED_TAU_RANGE = (0.02, 1.98)
"""Bounds of a controlled tau, wider: unrelated tokens score near sqrt(2), low rates need more; a controller returns."""


class Tau(nn.Module):
    """Drift threshold per head: a constant, a bounded parameter, or a float32 buffer moved between steps."""

    value: Tensor

    def __init__(self, num_heads: int, control: str) -> None:
        super().__init__()
        self.learned = control == "learned"
        if self.learned:
            self.theta = no_decay(nn.Parameter(torch.empty(num_heads)))
        else:
            self.register_buffer("value", torch.empty(num_heads))

    def forward(self) -> Tensor:
        """[H] float32; carries a gradient only where it is learned."""
        if self.learned:
            low, high = TAU_RANGE  # beyond it no gradient brings a learned tau back
            return low + (high - low) * exact(self.theta).sigmoid()
        return self.value


class SlotWeights(nn.Module):
    """lambda = softplus of a projection of the token's hidden state, one output per head and recency rank or level."""

    def __init__(self, width: int, num_heads: int, outputs: int) -> None:
        super().__init__()
        self.heads = num_heads
        self.weight = nn.Parameter(torch.empty(num_heads * outputs, width))
        self.bias = no_decay(nn.Parameter(torch.empty(num_heads * outputs)))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, D] -> [B, T, H, outputs] float32, 1 at initialisation."""
        wide = wide_dtype(hidden.dtype)
        shift = F.linear(hidden, self.weight.to(hidden.dtype)).to(wide) + exact(self.bias)
        return split_heads(F.softplus(shift + SOFTPLUS_ONE), self.heads)


@dataclass(frozen=True)
class RoutingTerms:
    """What content reading compares and how strongly it counts."""

    rho: Tensor
    """[B, T, Hk, R]: unit routing queries."""
    kappa: Tensor
    """[B, T, Hk, R]: unit routing keys."""
    gain: Tensor
    """[H] float32, >= 0."""
    sharpness: Tensor
    """[H] float32, > 0."""
    conv_inputs: tuple[Tensor, ...]
    """[B, T, Hk R] each: what passed a convolution of routing's own, before it."""


class Routing(nn.Module):
    """Routing queries and keys (q and k themselves, or own projections) with a gain and a sharpness per head.

    A value stands one token after its key. The state finds it by a key that passed the short convolution and so knows
    the token before; a slot is found in the same way only if its routing key does too.
    """

    non_negative = ("gain",)

    def __init__(self, model: ModelConfig, memory: MemoryConfig, context: Axis) -> None:
        super().__init__()
        self.key_heads, self.context = model.num_key_heads, context
        self.projected = memory.routing != "qk"
        self.dim = memory.routing_dim if self.projected else model.key_dim
        if self.projected:
            channels = self.key_heads * self.dim
            self.rho, self.kappa = Linear(model.width, channels), Linear(model.width, channels)
            width = model.conv_width if memory.routing == "convolved" else 0
            self.conv = ShortConv({"rho": channels, "kappa": channels}, width, context, activation=False)
        self.gain = no_decay(nn.Parameter(torch.empty(model.num_heads)))
        self.log_sharpness = no_decay(nn.Parameter(torch.empty(model.num_heads)))

    @property
    def own_conv_channels(self) -> list[int]:
        """Convolved channels of this context rank's heads inside the mixer: the last ones of a cache's window."""
        if not self.projected or not self.conv.width:
            return []
        ranks = self.context.size if self.key_heads > 1 else 1
        return [size // ranks for size in self.conv.sizes]

    def forward(self, hidden: Tensor, inputs: StateInputs, positions: Tensor, cache: MergeCache | None) -> RoutingTerms:
        """hidden [B, T, D], the state inputs and positions [B, T] of whole rows -> routing terms."""
        conv_inputs: tuple[Tensor, ...] = ()
        if self.projected:
            conv_inputs = tuple(self._of_heads(p(hidden)) for p in (self.rho, self.kappa))
            rho, kappa = (split_dims(x, self.dim) for x in self.conv(conv_inputs, positions, self._history(cache)))
        else:
            rho, kappa = inputs.q, inputs.k
        gain = exact(self.gain)
        gain = gain + (gain.clamp_min(0) - gain).detach()  # below 0 in a loaded model only
        heads = inputs.v.shape[2]
        gain, sharpness = (own_heads(x, heads, self.context) for x in (gain, exact(self.log_sharpness).exp()))
        convolved = conv_inputs if self.own_conv_channels else ()
        return RoutingTerms(l2_normalize(rho), l2_normalize(kappa), gain, sharpness, convolved)

    def _of_heads(self, x: Tensor) -> Tensor:
        """[B, T/ranks, Hk R] of all heads -> [B, T, C] of those of this context rank."""
        return to_heads(split_heads(x, self.key_heads), self.context).flatten(-2)

    def _history(self, cache: MergeCache | None) -> Tensor | None:
        own = sum(self.own_conv_channels)
        return cache.conv[:, -own:] if own and cache is not None and cache.conv is not None else None


class MemoryReader(nn.Module):
    """Threshold and read weights of one layer's memory."""

    def __init__(self, model: ModelConfig, memory: MemoryConfig, context: Axis) -> None:
        super().__init__()
        self.heads, self.context = model.num_heads // context.size, context
        self.capacity = memory.capacity
        self.levels = memory.levels if memory.policy == "log_linear" else None
        self.chunk = memory.chunk_tokens or None
        self.backend = None if memory.backend == "auto" else memory.backend
        self.tau = Tau(model.num_heads, memory.tau_control) if memory.policy == "dla" else None
        outputs = memory.read_outputs
        self.slots = SlotWeights(model.width, model.num_heads, outputs) if outputs else None
        self.routing = Routing(model, memory, context) if memory.routes else None

    @property
    def routing_dim(self) -> int:
        """R of the cache's key sums; 0 without content reading."""
        return self.routing.dim if self.routing is not None else 0

    def own_tau(self) -> Tensor:
        """[H] float32: thresholds of the heads this rank's memory holds."""
        assert self.tau is not None
        return own_heads(self.tau(), self.heads, self.context)

    def slot_weights(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Slot form by recency rank: hidden [B, T, D], positions [B, T] -> [B, T, H, S] float32.

        Under context parallelism hidden holds this rank's tokens, positions and the result all of them, H its heads.
        """
        if self.slots is None:
            shape = (*positions.shape, self.heads, self.capacity)
            return torch.ones(shape, dtype=wide_dtype(hidden.dtype), device=hidden.device)
        weights = to_heads(self.slots(hidden), self.context)
        if self.levels is None:
            return weights
        levels = log_linear_levels(positions, self.capacity, self.levels)
        return weights.gather(-1, levels[:, :, None].expand(-1, -1, self.heads, -1))

    def forward(
        self, hidden: Tensor, inputs: StateInputs, plan: MemoryPlan, cache: MergeCache | None
    ) -> tuple[Tensor, RoutingTerms | None]:
        """Read weights [B, T, H, S] float32 by recency rank, and the routing terms where reads are by content."""
        slot = self.slot_weights(hidden, plan.positions)
        if self.routing is None:
            return slot, None
        terms = self.routing(hidden, inputs, plan.positions, cache)
        affinity = slot_affinity(terms.rho, terms.kappa, plan, cache=cache, chunk_size=self.chunk, backend=self.backend)
        weights = content_read_weights(slot, affinity, gain=terms.gain, sharpness=terms.sharpness, backend=self.backend)
        return weights, terms
