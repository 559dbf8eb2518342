"""dla_kernels: the operations of Dynamic Linear Attention (arXiv 2606.10650), for torch and triton alone.

Shape legend, here and everywhere in the project:
    B batch   T tokens   D model width   H heads   Hk key heads   K key dim   V value dim
    C tokens of a chunk   N chunks   S memory slots   R routing dim
Layout of public operations is [batch, time, heads, dim]; head h shares key head h // (H // Hk). Decays are natural
logarithms, at most 0. Rank r of a slot is its recency: 0 is the open slot.
"""

from dla_kernels.attention import dla_attention, slot_affinity
from dla_kernels.conv1d import conv_window, short_conv
from dla_kernels.documents import document_positions, document_starts
from dla_kernels.launch import BACKENDS, BackendError
from dla_kernels.memory.cache import MergeCache
from dla_kernels.memory.gates import boundary_gate, boundary_score, content_read_weights, log_linear_levels
from dla_kernels.norm import gated_rms_norm, l2_normalize, rms_norm
from dla_kernels.plan import MemoryPlan
from dla_kernels.planner import POLICIES, plan_memory
from dla_kernels.step import dla_step

__all__ = [
    "BACKENDS",
    "POLICIES",
    "BackendError",
    "MemoryPlan",
    "MergeCache",
    "boundary_gate",
    "boundary_score",
    "content_read_weights",
    "conv_window",
    "dla_attention",
    "dla_step",
    "document_positions",
    "document_starts",
    "gated_rms_norm",
    "l2_normalize",
    "log_linear_levels",
    "plan_memory",
    "rms_norm",
    "short_conv",
    "slot_affinity",
]
