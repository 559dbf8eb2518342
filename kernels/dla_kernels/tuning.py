"""Pinned launch settings of every Triton kernel, by compute capability: 80 (A100) and 90 (H100, H200).

Block sizes carry their constexpr names; num_warps and num_stages are Triton's. Chosen by what compiles at production
shapes without spilling and fits shared memory (docs/performance.md); `launch.override_tuning` replaces them.
"""

from __future__ import annotations

TUNING: dict[str, dict[int, dict[str, int]]] = {
    # chunk operators
    # planner
    # slots and mixing
    # reads: affinity and gates
    # decode, convolution, norms
}
