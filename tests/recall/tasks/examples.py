"""One task of every kind, as a study names it."""

from dla_train.recall.tasks.needle import KINDS

EXAMPLES = [
    {"name": "paired_token", "needles": 24},
    {"name": "paired_token", "needles": 40, "filler": "random", "overwritten": 0.5, "tokens": 512},
    {"name": "mqar", "pairs": 8, "tokens": 128},
    {"name": "forgetting_mqar", "pairs": 8, "updates": 4, "tokens": 128},
    {"name": "sparse_mqar", "pairs": 32},
    {"name": "noisy_recall"},
    {"name": "selective_copying"},
    *({"name": "needle", "kind": kind} for kind in KINDS),
]
