"""Studies of tiny models for tests: plain values, and the file that holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "bias": False},
    "data": {"tokenizer": "bytes"},
    "train": {"steps": 120, "global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "trackers": []},
    "sparsity": {
        "block_size": 16,
        "update_interval": 10,
        "points": [[0, 0.25], [0.8, 0.25], [0.9, 1], [1, 1]],
        "growth": "random",
    },
    "attention": {"stride": 8},
}
DENSE = {"sparsity.algorithm": "dense", "sparsity.points": None, "sparsity.growth": None}


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Three arms at 40 % of the dense one, two seeds."""
    return {
        "name": "tiny",
        "folder": str(folder),
        "settings": SETTINGS,
        "budget": {"share": 0.4, "of": "dense"},
        "seeds": [1, 2],
        "baselines": ["small"],
        "arms": [
            {"name": "dense", "solve": "none", "settings": DENSE},
            {"name": "small", "solve": "width", "settings": DENSE},
            {"name": "mst"},
        ],
        **changes,
    }


def write(folder: Path, **changes: Any) -> Path:
    """JSON is YAML."""
    path = folder / "study.yaml"
    path.write_text(json.dumps(values(folder, **changes)), encoding="utf-8")
    return path
