"""Results reported by the paper (arXiv 2503.16081v2), in percent."""

from __future__ import annotations

# Table 1, test accuracy after training on the same task: (task, method) -> (2B, 7B)
TABLE_1 = {
    ("VC", "base"): (42.50, 76.00),
    ("VC", "grpo"): (64.50, 76.50),
    ("VC", "sft"): (68.50, 74.50),
    ("VC", "grpo_d"): (76.50, 78.00),
    ("GR", "base"): (15.52, 33.16),
    ("GR", "grpo"): (30.24, 42.04),
    ("GR", "sft"): (32.49, 43.50),
    ("GR", "grpo_d"): (34.35, 45.49),
}

# Fig. 7, 2B, trained on one task and tested on the other: (trained on, method, baseline) -> relative change
FIG_7 = {
    ("GR", "grpo_d", "base"): 63.53,
    ("GR", "grpo_d", "sft"): 61.63,
    ("VC", "grpo_d", "base"): 4.25,
    ("VC", "grpo_d", "sft"): 368.99,
    ("VC", "sft", "base"): -77.77,
}
