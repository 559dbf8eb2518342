"""What the memory formulas multiply: one rank's part of a layer, in rows, tokens, heads and bytes an element.

Three regions of a layer hold different parts of a row. The residual stream holds `residual_tokens`: time is divided
over the context ranks, and over the tensor ranks too with sequence parallelism. Projections and the MLP hold
`own_tokens`, with this tensor rank's heads and channels. Inside a mixer, context ranks exchange tokens for heads: all
`tokens`, `heads` of them. Heads here are always those inside the mixer.
"""

from __future__ import annotations

from dataclasses import dataclass

from dla_kernels.tuning import TUNING
from dla_train.config import Config, MemoryConfig, ModelConfig
from dla_train.data_config import segments_of_a_row
from dla_train.models.cost import routing_dim
from dla_train.parallel.sections import local_model
from dla_train.plan_run.layout import Layout
from dla_train.plan_run.states import FLOAT_BYTES, weight_bytes
from dla_train.plan_run.target import Target

INDEX_BYTES = 8
"""PyTorch's indices are int64."""
GPU_ARCHITECTURE = 90
"""Whose pinned chunk length is planned with: H100, H200."""


@dataclass(frozen=True)
class Kept:
    """Tensors of one part of a layer that live from forward to backward."""

    name: str
    bytes: int
    of_plan: bool = False
    """Whether they belong to the memory plan, which is kept under recomputation too."""


@dataclass(frozen=True)
class LayerShape:
    """One rank's part of a layer of a micro-batch."""

    model: ModelConfig
    """This tensor rank's heads, MLP channels and vocabulary rows."""
    memory: MemoryConfig
    rows: int
    """B: rows of the micro-batch."""
    context: int
    """T: tokens of a whole row, or of a segment of one."""
    segments: int
    """Segments that go through the model one after the other, with the memory carried between them."""
    context_ranks: int
    """Ranks that divide a row along time outside mixers and divide the heads inside."""
    shared_key_head: bool
    """Whether the whole model has a single key head, which every tensor rank has."""
    sequence_ranks: int
    """Ranks that divide the residual stream along time beyond that; 1 without sequence parallelism."""
    compute_bytes: int
    """Of an element of matrix products: 4 or 2."""
    cast_weights: bool
    """Whether weights are stored wider than they are used, so that a cast copy of each is kept for backward."""
    backend: str
    """Memory operations: `triton` or `torch`."""
    fused: bool
    """Norms and the short convolution are single operations (on CUDA)."""
    packed: bool
    """Rows hold several documents."""

    @classmethod
    def of(cls, config: Config, layout: Layout, target: Target) -> LayerShape:
        """A rank's layer under a layout that divides. Raises ConfigError where it does not."""
        device = target.device if config.train.device == "auto" else config.train.device
        backend = config.memory.backend
        compute_bytes = {"float32": 4, "bfloat16": 2}[config.train.dtype]
        return cls(
            model=local_model(config.model, layout.tensor),
            memory=config.memory,
            rows=layout.micro_batch_rows,
            context=config.train.segment_tokens or config.data.context_tokens,
            segments=segments_of_a_row(config),
            context_ranks=layout.context,
            shared_key_head=config.model.num_key_heads == 1,
            sequence_ranks=layout.tensor if layout.sequence else 1,
            compute_bytes=compute_bytes,
            cast_weights=compute_bytes < weight_bytes(layout),
            backend=("triton" if device == "cuda" else "torch") if backend == "auto" else backend,
            fused=device == "cuda",
            packed=target.packed,
        )

    @property
    def tokens(self) -> int:
        """Tokens inside a mixer."""
        return self.rows * self.context

    @property
    def own_tokens(self) -> int:
        """Tokens in projections and MLPs."""
        return self.tokens // self.context_ranks

    @property
    def residual_tokens(self) -> int:
        """Tokens in norms and the residual stream."""
        return self.own_tokens // self.sequence_ranks

    @property
    def heads(self) -> int:
        """H inside a mixer."""
        return self.model.num_heads // self.context_ranks

    @property
    def key_heads(self) -> int:
        """Hk inside a mixer; a single one serves all ranks."""
        return max(self.model.num_key_heads // self.context_ranks, 1)

    @property
    def key_size(self) -> int:
        """Hk K: numbers in a token's keys."""
        return self.key_heads * self.model.key_dim

    @property
    def value_size(self) -> int:
        """H V: numbers in a token's values."""
        return self.heads * self.model.value_dim

    @property
    def conv_size(self) -> int:
        """Channels of the short convolution, or of what takes its place."""
        return self.value_size + 2 * self.key_size

    @property
    def largest_weight(self) -> int:
        """Numbers in the largest matrix: the embedding's, or a projection's."""
        return self.model.width * max(
            self.model.vocab_size, self.model.mlp_width, self.model.num_heads * self.model.value_dim
        )

    @property
    def slots(self) -> int:
        """S."""
        return self.memory.capacity

    @property
    def routing_size(self) -> int:
        """Hk R: numbers in a token's routing keys; 0 without content reading."""
        return self.key_heads * routing_dim(self.model, self.memory)

    @property
    def weighted(self) -> bool:
        """Whether read weights differ from 1."""
        return self.memory.read != "unit"

    @property
    def frozen(self) -> bool:
        """Whether closed slots keep the state of their end."""
        return self.memory.closed_slots == "frozen"

    @property
    def erases(self) -> bool:
        """Whether a token's write erases first (Gated DeltaNet)."""
        return self.model.backbone == "gated_deltanet"

    @property
    def widened(self) -> bool:
        """Whether float32 arithmetic on activations works on copies of them."""
        return self.compute_bytes != FLOAT_BYTES

    @property
    def chunk(self) -> int:
        """C of mixing."""
        if self.memory.chunk_tokens:
            return self.memory.chunk_tokens
        if not self.fused:
            return 32 if self.model.key_dim <= 32 else 64
        return TUNING["mixing_chunk"][GPU_ARCHITECTURE]["C"] if self.backend == "triton" else 64

    @property
    def chunks(self) -> int:
        """N of a row."""
        return -(-self.context // self.chunk)

    @property
    def padded(self) -> bool:
        """Whether the last chunk of a row is padded."""
        return self.context % self.chunk != 0

    @property
    def cells(self) -> int:
        """Tokens times heads, whole chunks."""
        return self.rows * self.chunks * self.chunk * self.heads

    @property
    def edges(self) -> int:
        """Chunk edges times heads."""
        return self.rows * self.heads * (self.chunks + 1)

    @property
    def state_bytes(self) -> int:
        """All slots of all heads, once."""
        return FLOAT_BYTES * self.rows * self.heads * self.slots * self.model.key_dim * self.model.value_dim
