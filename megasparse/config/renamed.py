"""Settings and values of earlier versions, and what they are called now: an old configuration is refused by name."""

from __future__ import annotations

RENAMED_SETTINGS = {
    "sparsity.unit": "sparsity.block_size",
    "sparsity.groups.unit": "sparsity.groups.block_size",
    "sparsity.unit_step_counts": "sparsity.per_weight_step_counts",
    "train.tensorboard": "train.trackers",
}
"""Dotted name, list positions left out, in version 0.1 -> now."""

REMOVED_SETTINGS = {
    "train.replica_check_interval": "masks are checked before every topology update and checkpoint",
    "train.universal": "any checkpoint goes on in any layout by itself",
}
"""Dotted name in version 0.1 -> why it is not needed any more."""

RENAMED_VALUES = {
    ("kernels.hybrid_attention", "parts"): "tiled",
    ("sparsity.drop_score", "sensitivity"): "magnitude_over_gradient",
    ("sparsity.groups.drop_score", "sensitivity"): "magnitude_over_gradient",
}
"""(Setting, value in version 0.1) -> now."""
