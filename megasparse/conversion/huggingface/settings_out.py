"""config.json of transformers, written from our settings.

    architecture = choose_architecture(config)
    config_json = write_settings(architecture, config)

What no architecture of the table computes is refused with the setting that is in the way.
"""

from __future__ import annotations

from typing import Any

from megasparse.config.loader import ConfigError
from megasparse.config.schema import ModelConfig, RunConfig
from megasparse.conversion.huggingface.architectures import ARCHITECTURES, GPT2, LLAMA, MISTRAL, QWEN2, Architecture
from megasparse.utils.activations import ACTIVATIONS, by_transformers_name


def choose_architecture(config: RunConfig, wanted: str | None = None) -> Architecture:
    """The first architecture that computes what this model does, or `wanted`.

    Raises ConfigError naming what is in the way.
    """
    if wanted is not None and wanted not in ARCHITECTURES:
        raise ConfigError(f"architecture: {wanted!r}; must be one of {', '.join(ARCHITECTURES)}")
    candidates = [GPT2, LLAMA, QWEN2, MISTRAL] if wanted is None else [ARCHITECTURES[wanted]]
    reasons = []
    for architecture in candidates:
        obstacle = _obstacle(architecture, config)
        if obstacle is None:
            return architecture
        reasons.append(f"{architecture.name}: {obstacle}")
    raise ConfigError(f"no architecture of transformers computes this model; {'; '.join(reasons)}")


def _obstacle(architecture: Architecture, config: RunConfig) -> str | None:
    """The first setting that the architecture cannot express, with what it must be."""
    model, window = config.model, config.attention.sliding_window
    if config.sparsity.algorithm != "dense" and config.sparsity.low_rank:
        return f"sparsity.low_rank is {config.sparsity.low_rank}; must be 0"
    activations = tuple(dict.fromkeys(by_transformers_name(gated=architecture is not GPT2).values()))
    wanted: dict[str, tuple[Any, tuple[Any, ...]]]
    if architecture is GPT2:
        wanted = {
            "position_embedding": (model.position_embedding, ("learned",)),
            "normalization": (model.normalization, ("layernorm",)),
            "activation": (model.activation, activations),
            "num_key_value_heads": (model.key_value_heads, (model.num_attention_heads,)),
            "attention_head_dim": (model.head_dim * model.num_attention_heads, (model.hidden_size,)),
        }
    else:
        wanted = {
            "position_embedding": (model.position_embedding, ("rope",)),
            "normalization": (model.normalization, ("rmsnorm",)),
            "activation": (model.activation, activations),
            "bias": (model.bias, (True, False) if architecture is LLAMA else (False,)),
            "qkv_bias": (model.has_qkv_bias, (True,) if architecture is QWEN2 else (model.bias,)),
        }
        if architecture is LLAMA:
            # transformers refuses others for Llama.
            wanted["hidden_size"] = (model.hidden_size % model.num_attention_heads, (0,))
    wanted["normalization_position"] = (model.normalization_position, ("pre",))
    wanted["attention.windows"] = (window, (window,) if architecture is MISTRAL else (None,))
    for field, (value, allowed) in wanted.items():
        if value not in allowed:
            name = field if "." in field else f"model.{field}"
            return f"{name} is {value!r}; must be one of {', '.join(map(repr, allowed))}"
    return None


def write_settings(architecture: Architecture, config: RunConfig) -> dict[str, Any]:
    """config.json for a model that ``choose_architecture`` has accepted, token ids and dtype left to the caller."""
    model = config.model
    common = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "use_cache": True,
    }
    specific = _write_gpt2(model) if architecture is GPT2 else _write_llama(model)
    if architecture is LLAMA:
        specific |= {"attention_bias": model.bias, "mlp_bias": model.bias}
    if architecture is QWEN2:
        specific |= {"use_sliding_window": False}
    if architecture is MISTRAL:
        specific |= {"sliding_window": config.attention.sliding_window}
    return {**common, **specific}


def _write_gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "n_positions": model.seq_length,
        # The same by its older name, which programs besides transformers read.
        "n_ctx": model.seq_length,
        "layer_norm_epsilon": model.normalization_epsilon,
        "activation_function": ACTIVATIONS[model.activation].transformers_names[0],
        **{name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
    }


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    values: dict[str, Any] | None = None
    if scaling is not None:
        values = {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type == "llama3":
            values["low_freq_factor"] = scaling.low_freq_factor
            values["high_freq_factor"] = scaling.high_freq_factor
            values["original_max_position_embeddings"] = scaling.original_seq_length
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.normalization_epsilon,
        "hidden_act": ACTIVATIONS[model.activation].transformers_names[0],
        "rope_theta": model.rope_theta,
        "rope_scaling": values,
        "attention_dropout": 0.0,
    }
