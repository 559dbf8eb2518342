"""Pinned launch settings of every Triton kernel, by compute capability: 80 (A100) and 90 (H100, H200).

Block sizes carry their constexpr names; num_warps and num_stages are Triton's. Chosen by what compiles at production
shapes without spilling and fits shared memory (docs/performance.md); `launch.override_tuning` replaces them.
"""

from __future__ import annotations

TUNING: dict[str, dict[int, dict[str, int]]] = {
    # chunk operators
    "chunk_decays": {80: {"num_warps": 2, "num_stages": 1}, 90: {"num_warps": 2, "num_stages": 1}},
    "decays_backward": {80: {"num_warps": 2, "num_stages": 1}, 90: {"num_warps": 2, "num_stages": 1}},
    "write_matrix": {
        80: {"BK": 64, "num_warps": 4, "num_stages": 2},
        90: {"BK": 64, "num_warps": 4, "num_stages": 2},
    },
    # planner
    # slots and mixing
    "slot_versions": {80: {"num_warps": 1, "num_stages": 1}, 90: {"num_warps": 1, "num_stages": 1}},
    "write_chunks": {
        80: {"BK": 64, "BV": 64, "BT": 16, "num_warps": 4, "num_stages": 2},
        90: {"BK": 64, "BV": 64, "BT": 16, "num_warps": 4, "num_stages": 2},
    },
    "sweep_states": {
        80: {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 2},
        90: {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 2},
    },
    "sweep_adjoints": {
        80: {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 2},
        90: {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 2},
    },
    "mix_read": {
        80: {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
        90: {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
    },
    "mix_read_backward": {
        80: {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
        90: {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
    },
    "mix_erase_backward": {
        80: {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 2},
        90: {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 2},
    },
    "mix_within_backward": {
        80: {"BV": 16, "num_warps": 8, "num_stages": 1},
        90: {"BV": 64, "num_warps": 8, "num_stages": 1},
    },
    "mix_write_backward": {
        80: {"BT": 16, "BK": 32, "BV": 64, "num_warps": 8, "num_stages": 2},
        90: {"BT": 16, "BK": 32, "BV": 64, "num_warps": 8, "num_stages": 2},
    },
    # reads: affinity and gates
    "token_deaths": {
        80: {"BX": 1024, "num_warps": 4, "num_stages": 1},
        90: {"BX": 1024, "num_warps": 4, "num_stages": 1},
    },
    "slot_table": {80: {"num_warps": 1, "num_stages": 1}, 90: {"num_warps": 1, "num_stages": 1}},
    "slot_weights_by_slot": {
        80: {"BT": 32, "num_warps": 4, "num_stages": 1},
        90: {"BT": 32, "num_warps": 4, "num_stages": 1},
    },
    "add_slot_weight_gradients": {
        80: {"BT": 32, "num_warps": 4, "num_stages": 1},
        90: {"BT": 32, "num_warps": 4, "num_stages": 1},
    },
    # decode, convolution, norms
    "step_decide": {
        80: {"BV": 32, "BR": 32, "num_warps": 8, "num_stages": 1},
        90: {"BV": 32, "BR": 32, "num_warps": 8, "num_stages": 1},
    },
    "step_update": {80: {"BV": 16, "num_warps": 4, "num_stages": 1}, 90: {"BV": 16, "num_warps": 4, "num_stages": 1}},
    "short_conv": {
        80: {"BT": 64, "BC": 64, "num_warps": 8, "num_stages": 1},
        90: {"BT": 64, "BC": 64, "num_warps": 8, "num_stages": 1},
    },
    "short_conv_backward": {
        80: {"BT": 64, "BC": 64, "num_warps": 8, "num_stages": 1},
        90: {"BT": 64, "BC": 64, "num_warps": 8, "num_stages": 1},
    },
    "rms_norm": {
        80: {"BLOCK": 4096, "num_warps": 8, "num_stages": 1},
        90: {"BLOCK": 4096, "num_warps": 8, "num_stages": 1},
    },
    "rms_norm_backward": {
        80: {"BLOCK": 4096, "PARTS": 512, "num_warps": 8, "num_stages": 1},
        90: {"BLOCK": 4096, "PARTS": 512, "num_warps": 8, "num_stages": 1},
    },
}
