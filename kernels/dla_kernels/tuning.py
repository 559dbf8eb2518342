"""Pinned launch settings of every Triton kernel, by compute capability: 80 (A100) and 90 (H100, H200).

Block sizes carry their constexpr names; num_warps and num_stages are Triton's. Chosen by what compiles at production
shapes without spilling and fits shared memory (docs/performance.md); `launch.override_tuning` replaces them.
"""

from __future__ import annotations

TUNING: dict[str, dict[int, dict[str, int]]] = {
    # chunk operators
    "chunk_decays": {80: {"num_warps": 1, "num_stages": 1}, 90: {"num_warps": 1, "num_stages": 1}},
    "decays_backward": {80: {"num_warps": 4, "num_stages": 1}, 90: {"num_warps": 4, "num_stages": 1}},
    "write_matrix": {
        80: {"BK": 64, "num_warps": 4, "num_stages": 2},
        90: {"BK": 64, "num_warps": 4, "num_stages": 2},
    },
    "mamba2_operators": {
        80: {"BK": 64, "HEADS": 8, "num_warps": 8, "num_stages": 2},
        90: {"BK": 64, "HEADS": 8, "num_warps": 8, "num_stages": 2},
    },
    "mamba2_scores_backward": {
        80: {"BK": 32, "num_warps": 8, "num_stages": 2},
        90: {"BK": 128, "num_warps": 8, "num_stages": 1},
    },
    "mamba2_input_backward": {
        80: {"BK": 64, "HEADS": 8, "num_warps": 8, "num_stages": 1},
        90: {"BK": 64, "HEADS": 8, "num_warps": 8, "num_stages": 1},
    },
    "gated_operators": {
        80: {"BK": 32, "num_warps": 8, "num_stages": 1},
        90: {"BK": 64, "num_warps": 4, "num_stages": 1},
    },
    "gated_mixing_backward": {
        80: {"BK": 32, "num_warps": 8, "num_stages": 1},
        90: {"BK": 32, "num_warps": 8, "num_stages": 1},
    },
    "gated_matrix_backward": {
        80: {"BK": 64, "num_warps": 8, "num_stages": 1},
        90: {"BK": 32, "num_warps": 4, "num_stages": 1},
    },
    "gated_inputs": {
        80: {"BK": 32, "num_warps": 4, "num_stages": 1},
        90: {"BK": 64, "num_warps": 4, "num_stages": 1},
    },
    # planner
    "drift_tables": {
        80: {"BK": 64, "BV": 64, "num_warps": 2, "num_stages": 2},
        90: {"BK": 64, "BV": 64, "num_warps": 2, "num_stages": 2},
    },
    "drift_keys": {
        80: {"BK": 32, "num_warps": 2, "num_stages": 2},
        90: {"BK": 32, "num_warps": 2, "num_stages": 2},
    },
    "drift_links": {
        80: {"BK": 32, "BV": 64, "num_warps": 2, "num_stages": 2},
        90: {"BK": 32, "BV": 64, "num_warps": 2, "num_stages": 2},
    },
    "drift_guess": {80: {"num_warps": 1, "num_stages": 1}, 90: {"num_warps": 1, "num_stages": 1}},
    "drift_states": {
        80: {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 1},
        90: {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 1},
    },
    "drift_entry": {
        80: {"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1},
        90: {"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1},
    },
    "drift_walk": {
        80: {"BK": 32, "BV": 16, "num_warps": 4, "num_stages": 1},
        90: {"BK": 32, "BV": 32, "num_warps": 4, "num_stages": 1},
    },
    "drift_follow": {80: {"num_warps": 1, "num_stages": 1}, 90: {"num_warps": 1, "num_stages": 1}},
    "drift_reads": {
        80: {"BK": 16, "BV": 32, "num_warps": 2, "num_stages": 1},
        90: {"BK": 16, "BV": 32, "num_warps": 2, "num_stages": 1},
    },
    "drift_gradients": {
        80: {"BK": 16, "BV": 32, "num_warps": 2, "num_stages": 1},
        90: {"BK": 32, "BV": 32, "num_warps": 2, "num_stages": 1},
    },
    "boundary_lists": {
        80: {"BX": 1024, "num_warps": 4, "num_stages": 1},
        90: {"BX": 1024, "num_warps": 4, "num_stages": 1},
    },
    # on sm90 ptxas keeps a single warp to 64 registers, and spills, unless it is told that it may take more
    "capacity_walk": {80: {"num_warps": 1, "num_stages": 1}, 90: {"num_warps": 1, "num_stages": 1, "maxnreg": 128}},
    # slots and mixing
    "mixing_chunk": {80: {"C": 64}, 90: {"C": 128}},  # no kernel: tokens of a chunk
    "slot_versions": {80: {"num_warps": 1, "num_stages": 1}, 90: {"num_warps": 1, "num_stages": 1}},
    "write_chunks": {
        80: {"BK": 64, "BV": 64, "BT": 16, "num_warps": 4, "num_stages": 2},
        90: {"BK": 64, "BV": 64, "BT": 16, "num_warps": 4, "num_stages": 2},
    },
    "sweep_states": {
        80: {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
        90: {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
    },
    "sweep_states_erasing": {
        80: {"BK": 64, "BV": 32, "num_warps": 8, "num_stages": 2},
        90: {"BK": 64, "BV": 32, "num_warps": 8, "num_stages": 2},
    },
    "sweep_adjoints": {
        80: {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
        90: {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
    },
    "sweep_adjoints_erasing": {
        80: {"BK": 64, "BV": 16, "num_warps": 8, "num_stages": 1},
        90: {"BK": 64, "BV": 16, "num_warps": 8, "num_stages": 1},
    },
    "mix_read": {
        80: {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 2},
        90: {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 2},
    },
    "mix_read_backward": {
        80: {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 2},
        90: {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 2},
    },
    "mix_erase_backward": {
        80: {"BK": 64, "BV": 32, "num_warps": 8, "num_stages": 2},
        90: {"BK": 64, "BV": 32, "num_warps": 8, "num_stages": 2},
    },
    "mix_within_backward": {
        80: {"BT": 32, "BV": 64, "num_warps": 8, "num_stages": 2},
        90: {"BT": 32, "BV": 64, "num_warps": 8, "num_stages": 2},
    },
    "mix_values_backward": {
        80: {"BV": 64, "num_warps": 8, "num_stages": 1},
        90: {"BV": 64, "num_warps": 8, "num_stages": 1},
    },
    "mix_write_backward": {
        80: {"BT": 16, "BK": 32, "BV": 32, "num_warps": 4, "num_stages": 2},
        90: {"BT": 16, "BK": 32, "BV": 32, "num_warps": 4, "num_stages": 2},
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
    "gate_weights": {
        80: {"BT": 16, "num_warps": 4, "num_stages": 1},
        90: {"BT": 16, "num_warps": 4, "num_stages": 1},
    },
    "gate_weights_backward": {
        80: {"BT": 32, "num_warps": 4, "num_stages": 1},
        90: {"BT": 32, "num_warps": 8, "num_stages": 1},
    },
    "gate_adjoints": {80: {"num_warps": 1, "num_stages": 1}, 90: {"num_warps": 1, "num_stages": 1}},
    "gate_gradients": {80: {"num_warps": 4, "num_stages": 1}, 90: {"num_warps": 4, "num_stages": 1}},
    "content_weights": {
        80: {"BX": 64, "num_warps": 4, "num_stages": 1},
        90: {"BX": 64, "num_warps": 4, "num_stages": 1},
    },
    "content_weights_backward": {
        80: {"BX": 64, "num_warps": 4, "num_stages": 1},
        90: {"BX": 64, "num_warps": 4, "num_stages": 1},
    },
    "key_sums_added": {
        80: {"BR": 64, "num_warps": 4, "num_stages": 1},
        90: {"BR": 64, "num_warps": 4, "num_stages": 1},
    },
    "key_sums_carried": {
        80: {"BR": 32, "num_warps": 4, "num_stages": 1},
        90: {"BR": 32, "num_warps": 4, "num_stages": 1},
    },
    "affinity_read": {
        80: {"BR": 64, "BT": 16, "num_warps": 8, "num_stages": 1},
        90: {"BR": 64, "BT": 16, "num_warps": 8, "num_stages": 1},
    },
    "affinity_scale": {
        80: {"BT": 16, "num_warps": 4, "num_stages": 1},
        90: {"BT": 16, "num_warps": 4, "num_stages": 1},
    },
    "affinity_query_gradient": {
        80: {"BR": 128, "BT": 16, "GROUP": 8, "num_warps": 4, "num_stages": 1},
        90: {"BR": 128, "BT": 16, "GROUP": 8, "num_warps": 8, "num_stages": 1},
    },
    "affinity_sums_gradient": {
        80: {"BR": 128, "BT": 16, "num_warps": 4, "num_stages": 1},
        90: {"BR": 128, "BT": 16, "num_warps": 4, "num_stages": 1},
    },
    "affinity_adjoints": {
        80: {"BR": 32, "num_warps": 4, "num_stages": 1},
        90: {"BR": 32, "num_warps": 4, "num_stages": 1},
    },
    "affinity_key_gradient": {
        80: {"BR": 128, "BT": 32, "GROUP": 8, "num_warps": 8, "num_stages": 1},
        90: {"BR": 128, "BT": 32, "GROUP": 8, "num_warps": 8, "num_stages": 1},
    },
    # decode, convolution, norms
    "step_decide": {
        80: {"BV": 32, "BR": 32, "num_warps": 8, "num_stages": 1},
        90: {"BV": 32, "BR": 32, "num_warps": 8, "num_stages": 1},
    },
    "step_update": {80: {"BV": 16, "num_warps": 8, "num_stages": 1}, 90: {"BV": 16, "num_warps": 4, "num_stages": 1}},
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
