"""What a configuration costs, by formula: parameters, FLOPs per token, bytes of the decode cache. No tensor is made.

FLOPs count a multiply-add as 2. Counted: every projection and the head (2 per weight), softmax attention's two products
over the (T + 1) / 2 keys an average query sees, the short convolution's taps, and the memory's arithmetic in its
chunkwise form (docs/dla.md, sections 5 and 6). Not counted: embedding look-ups, norms, activations, softmax, masks.
Training is forward plus twice that in backward, without recomputation, so that MFU measures useful work.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dla_kernels import MergeCache
from dla_train.config import MemoryConfig, ModelConfig
from dla_train.parallel.axes import Axes
from dla_train.parallel.sections import local_model

DEFAULT_CHUNK_TOKENS = 64
"""C in the formulas where `memory.chunk_tokens` is 0."""


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one token, by part; forward pass."""

    dense: float
    """Projections, MLPs, read-weight projections and the head."""
    attention: float
    """Softmax attention's QK^T and PV."""
    conv: float
    """Short convolutions."""
    memory: float
    """Planning, mixing, slot reads and state updates of recurrent mixers."""

    @property
    def forward(self) -> float:
        """One forward pass."""
        return self.dense + self.attention + self.conv + self.memory

    @property
    def training(self) -> float:
        """Forward and backward."""
        return 3 * self.forward


def routing_dim(model: ModelConfig, memory: MemoryConfig) -> int:
    """R: size of a routing key; 0 without content reading."""
    if model.backbone == "attention" or not memory.routes:
        return 0
    return model.key_dim if memory.routing == "qk" else memory.routing_dim


def conv_channels(model: ModelConfig, memory: MemoryConfig) -> int:
    """Channels of the short convolutions: values, two sets of keys, and two of routing's; 0 without one."""
    routed = model.conv_width and memory.routing == "convolved"
    routing = 2 * model.num_key_heads * routing_dim(model, memory) if routed else 0
    return _backbone_conv_channels(model) + routing


def _backbone_conv_channels(model: ModelConfig) -> int:
    if model.backbone == "attention" or not model.conv_width:
        return 0
    return model.num_heads * model.value_dim + 2 * model.num_key_heads * model.key_dim


def parameter_count(model: ModelConfig, memory: MemoryConfig) -> int:
    """Number of trainable parameters, tied embeddings counted once."""
    norms = model.width * (2 if model.mlp_width else 1)
    mixer = _mixer_matrices(model) + _mixer_vectors(model, memory) + _reader_parameters(model, memory)
    layer = mixer + _mlp(model) + norms
    embeddings = model.vocab_size * model.width * (1 if model.tie_embeddings else 2)
    return embeddings + model.num_layers * layer + model.width


def flops_per_token(model: ModelConfig, memory: MemoryConfig, context: int) -> FlopCount:
    """FLOPs of an average token in documents of `context` tokens."""
    layers = model.num_layers
    dense = layers * layer_matrices(model, memory) + model.vocab_size * model.width
    if model.backbone == "attention":
        per_key = 2 * 2 * model.num_heads * model.key_dim
        return FlopCount(2.0 * dense, layers * per_key * (context + 1) / 2, 0.0, 0.0)
    conv = 2.0 * layers * conv_channels(model, memory) * model.conv_width
    return FlopCount(2.0 * dense, 0.0, conv, layers * _memory_flops(model, memory, context))


def cache_bytes(
    model: ModelConfig, memory: MemoryConfig, batch: int, max_tokens: int, *, compute_bytes: int = 4
) -> int:
    """Bytes of the decode caches of all layers. Grows with `max_tokens` for attention only.

    `compute_bytes` is the size of an element of attention's keys (4 float32, 2 bfloat16); states are always float32.
    """
    if model.backbone == "attention":
        per_layer = batch * (2 * max_tokens * model.num_key_heads * model.key_dim * compute_bytes + 8)
    else:
        per_layer = MergeCache.nbytes_of(
            batch,
            model.num_heads,
            memory.capacity,
            model.key_dim,
            model.value_dim,
            routing_dim(model, memory),
            conv_channels(model, memory),
            model.conv_width,
        )
    return model.num_layers * per_layer


def merge_cache_bytes(model: ModelConfig, memory: MemoryConfig, axes: Axes, rows: int) -> int:
    """Bytes of the merge caches of all layers on one rank, of its heads and `rows` sequences; 0 for attention.

    Whatever the context: MergeCache.nbytes_of a layer, with heads divided over tensor and context ranks.
    """
    if model.backbone == "attention":
        return 0
    own = local_model(model, axes.tensor.size)
    heads, key_heads = own.num_heads // axes.context.size, max(own.num_key_heads // axes.context.size, 1)
    return cache_bytes(dataclasses.replace(own, num_heads=heads, num_key_heads=key_heads), memory, rows, 0)


def layer_matrices(model: ModelConfig, memory: MemoryConfig) -> int:
    """Weights of one layer's matrices: projections, read weights, MLP. Those a step in 16 bits makes copies of."""
    return _mixer_matrices(model) + _reader_matrices(model, memory) + _mlp(model)


def _mlp(model: ModelConfig) -> int:
    return 3 * model.width * model.mlp_width


def _mixer_matrices(model: ModelConfig) -> int:
    """Weights of a mixer's projections."""
    keys, values = model.num_key_heads * model.key_dim, model.num_heads * model.value_dim
    if model.backbone == "attention":
        return model.width * (2 * model.num_heads * model.key_dim + 2 * keys)
    per_head = {"mamba2": 1, "gated_deltanet": 2}[model.backbone]  # dt; a and b
    return model.width * (2 * keys + 3 * values + per_head * model.num_heads)


def _mixer_vectors(model: ModelConfig, memory: MemoryConfig) -> int:
    """Convolution taps and biases, A_log, dt_bias, D and the output norm's weight."""
    if model.backbone == "attention":
        return 0
    biases = _backbone_conv_channels(model) if model.conv_bias else 0
    taps = conv_channels(model, memory) * model.conv_width + biases
    if model.backbone == "mamba2":
        return taps + 3 * model.num_heads + model.num_heads * model.value_dim
    return taps + 2 * model.num_heads + model.value_dim


def _read_outputs(model: ModelConfig, memory: MemoryConfig) -> int:
    """Rows of the slot-weight projection."""
    return 0 if model.backbone == "attention" else model.num_heads * memory.read_outputs


def _reader_matrices(model: ModelConfig, memory: MemoryConfig) -> int:
    routing = 0 if memory.routing == "qk" else 2 * model.num_key_heads * routing_dim(model, memory)
    return model.width * (_read_outputs(model, memory) + routing)


def _reader_parameters(model: ModelConfig, memory: MemoryConfig) -> int:
    if model.backbone == "attention":
        return 0
    content = 2 * model.num_heads if memory.routes else 0
    tau = model.num_heads if memory.policy == "dla" and memory.tau_control == "learned" else 0
    return _reader_matrices(model, memory) + _read_outputs(model, memory) + content + tau


def _memory_flops(model: ModelConfig, memory: MemoryConfig, context: int) -> float:
    """One layer's memory, per token: the chunkwise form with every slot live; causal C x C products count half."""
    chunk = min(memory.chunk_tokens or DEFAULT_CHUNK_TOKENS, context)
    k, v, slots = model.key_dim, model.value_dim, memory.capacity
    moved = 1 if memory.closed_slots == "frozen" else slots
    mixing = float(chunk * v + 2 * slots * k * v + 2 * k * v)  # (M * W) V, the slots' reads, the chunk's writes
    shared = float(chunk * k)  # q k^T, once a key head
    if model.backbone == "gated_deltanet":
        shared += chunk * k  # k k^T
        mixing += chunk * chunk / 3 + chunk * chunk / 3 + 3 * chunk * k  # T, A T, and Wy, A Wy, K~
        mixing += 2 * k * k + 2 * moved * k * k * v / chunk  # Gam, and Gam S of the slots that still move
    if memory.policy == "dla":
        mixing += chunk * v + chunk * chunk + 2 * k * v  # V V^T, the drift tables, the open slot's row
    if memory.routes:
        mixing += 2 * (slots + chunk / 2) * routing_dim(model, memory)  # rho . kappa of old slots and inside the chunk
    return model.num_heads * mixing + model.num_key_heads * shared
