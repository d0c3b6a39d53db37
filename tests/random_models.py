"""Random tiny models of transformers, saved as folders, and ours opened from a model folder."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from megasparse.checkpoint.model_folder import ModelFolder, load_weights
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.sparsity.schedule import PatternSchedule, pattern_at

V, T = 97, 40
"""97 entries are divisible by no number of ranks."""

LLAMA = {
    "vocab_size": V, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": T, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CASES = {
    "gpt2": ("GPT2", {"vocab_size": V, "n_positions": T, "n_embd": 48, "n_layer": 2, "n_head": 4}),
    "gpt2-exact-untied": (
        "GPT2",
        {
            "vocab_size": V, "n_positions": T, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 80,
            "activation_function": "gelu", "tie_word_embeddings": False,
        },
    ),
    "llama2": ("Llama", LLAMA),
    "llama3": ("Llama", {**LLAMA, "num_key_value_heads": 4, "num_attention_heads": 8, "rope_parameters": LLAMA3_ROPE}),
    "llama-tied-biases": (
        "Llama",
        {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama-linear": (
        "Llama",
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    ),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": None, "num_key_value_heads": 4, "head_dim": 8}),
    "mistral-window": ("Mistral", {**LLAMA, "sliding_window": 7}),
    "qwen2": (
        "Qwen2",
        {**LLAMA, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2-untied": ("Qwen2", {**LLAMA, "tie_word_embeddings": False}),
}  # fmt: skip


def randomize(model: torch.nn.Module) -> None:
    """Fresh weights of a size that makes every part matter: norms and biases too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or ".ln_" in name else 0.0, 0.15)


def random_model(case: str) -> torch.nn.Module:
    kind, settings = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**settings)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    randomize(model)
    return model


def save(case: str, folder: Path, **options) -> torch.nn.Module:
    """A random model of the case, saved as transformers does it."""
    model = random_model(case)
    model.save_pretrained(folder, **options)
    return model


def our_model(folder: Path, tensor_parallel=None) -> GPT:
    """The model of a model folder, or a rank's shard of it, under its attention pattern."""
    opened = ModelFolder(folder)
    model = build_model(opened.config, opened.config.model.vocab_size, tensor_parallel)
    load_weights(model, opened, tensor_parallel.rank if tensor_parallel else 0)
    schedule = PatternSchedule(opened.config.attention, len(model.layers), opened.config.model.num_attention_heads)
    model.set_attention_patterns(schedule.layer_patterns(pattern_at(opened.config, 0, schedule)))
    return model.eval()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
