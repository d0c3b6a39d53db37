"""The README.md of an exported model: what it is, how it was trained, how it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megasparse.config.schema import RunConfig

ROWS = {
    "run": "run",
    "step": "optimizer steps done",
    "steps": "optimizer steps of the whole run",
    "tokens": "tokens seen",
    "loss": "training loss",
    "val_loss": "validation loss",
    "algorithm": "sparsity algorithm",
    "density": "density of the sparse matrices",
}


def model_card(
    config: RunConfig, facts: Mapping[str, Any], dtype: str, parameters: int, zeros: int, notes: Sequence[str]
) -> str:
    """Markdown with the front matter that model hubs read. facts: rows that are not known are left out."""
    model = config.model
    rows = [
        ("architecture", facts["architecture"]),
        ("parameters", f"{parameters:,}"),
        ("parameters that are exactly 0", f"{zeros:,} ({zeros / max(parameters, 1):.1%})"),
        ("dtype", dtype),
        ("layers, hidden size, heads", f"{model.num_layers}, {model.hidden_size}, {model.num_attention_heads}"),
        ("context", f"{model.seq_length} tokens"),
        ("vocabulary", f"{model.vocab_size:,}"),
        *((label, _shown(facts[key])) for key, label in ROWS.items() if facts.get(key) is not None),
    ]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [megasparse]",
        "---",
        "",
        f"# {facts.get('run', config.run.name)}",
        "",
        "Exported by MegaSparse (`tools/convert_checkpoint.py to-huggingface`).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {value} |" for label, value in rows),
        "",
        *(f"Note: {note}.\n" for note in notes),
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
