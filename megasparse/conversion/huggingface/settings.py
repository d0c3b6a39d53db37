"""config.json of transformers, read into our settings.

    architecture, values = read_settings(config_json)       # sections `model` and `attention`, for check_config

What our model cannot compute is refused: every setting that changes results is read, or must have its usual value.
Rates of dropout are no part of a trained model, and there is none in ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megasparse.config.loader import ConfigError
from megasparse.conversion.huggingface.architectures import ARCHITECTURES, GPT2, MISTRAL, QWEN2, Architecture
from megasparse.utils.activations import by_transformers_name

ROPE_NAMES = {
    "rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "partial_rotary_factor",
}  # fmt: skip


class Settings:
    """config.json, asked field by field."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    @property
    def fields(self) -> set[str]:
        return set(self._values)

    def get(self, field: str, default: Any = None) -> Any:
        value = self._values.get(field)
        return default if value is None else value

    def number(self, field: str) -> int:
        value = self._values.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"config.json: {field}: {value!r}; must be whole numbers of at least 1")
        return value

    def must_be(self, field: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """The value, one of `allowed`; `default` where it is not there or null."""
        value = self.get(field, default)
        if value not in allowed:
            raise ConfigError(f"config.json: {field}: {value!r}; must be one of {', '.join(map(repr, allowed))}")
        return value


def read_settings(values: Mapping[str, Any]) -> tuple[Architecture, dict[str, Any]]:
    """The architecture, and our sections `model` and `attention` as nested plain values.

    Raises ConfigError naming the field, its value and what it must be.
    """
    settings = Settings(values)
    names = settings.get("architectures", [])
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise ConfigError(f"config.json: architectures: {names!r}; must be one of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[names[0]]
    settings.must_be("model_type", (architecture.model_type,), architecture.model_type)
    for field, meaning in (("quantization_config", "weights that are not quantised"), ("auto_map", "no code")):
        if settings.get(field) is not None:
            raise ConfigError(f"config.json: {field}: is set; must be unset, which means {meaning}")
    if architecture is GPT2:
        return architecture, {"model": _read_gpt2(settings)}
    attention = _read_window(settings, architecture)
    return architecture, {
        "model": _read_llama(settings, architecture),
        **({"attention": attention} if attention else {}),
    }


def _read_gpt2(settings: Settings) -> dict[str, Any]:
    settings.must_be("scale_attn_weights", (True,), True)
    settings.must_be("scale_attn_by_inverse_layer_idx", (False,), False)
    settings.must_be("add_cross_attention", (False,), False)
    activations = by_transformers_name(gated=False)
    return {
        "num_layers": settings.number("n_layer"),
        "hidden_size": settings.number("n_embd"),
        "num_attention_heads": settings.number("n_head"),
        "ffn_hidden_size": settings.get("n_inner"),
        "seq_length": settings.number("n_positions"),
        "vocab_size": settings.number("vocab_size"),
        "position_embedding": "learned",
        "normalization": "layernorm",
        "normalization_epsilon": settings.get("layer_norm_epsilon", 1e-5),
        "activation": activations[settings.must_be("activation_function", tuple(activations), "gelu_new")],
        "bias": True,
        "tie_embeddings": settings.must_be("tie_word_embeddings", (True, False), True),
        "init_std": settings.get("initializer_range", 0.02),
    }


def _read_llama(settings: Settings, architecture: Architecture) -> dict[str, Any]:
    activations = by_transformers_name(gated=True)
    bias, qkv_bias = _read_biases(settings, architecture)
    hidden, heads = settings.number("hidden_size"), settings.number("num_attention_heads")
    head_dim = settings.get("head_dim")
    return {
        "num_layers": settings.number("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("num_key_value_heads", heads),
        "attention_head_dim": None if head_dim is not None and head_dim * heads == hidden else head_dim,
        "ffn_hidden_size": settings.number("intermediate_size"),
        "seq_length": settings.number("max_position_embeddings"),
        "vocab_size": settings.number("vocab_size"),
        "position_embedding": "rope",
        **_read_rope(settings),
        "normalization": "rmsnorm",
        "normalization_epsilon": settings.get("rms_norm_eps", 1e-6),
        "activation": activations[settings.must_be("hidden_act", tuple(activations), "silu")],
        "bias": bias,
        "qkv_bias": qkv_bias,
        "tie_embeddings": settings.must_be("tie_word_embeddings", (True, False), False),
        "init_std": settings.get("initializer_range", 0.02),
    }


def _read_biases(settings: Settings, architecture: Architecture) -> tuple[bool, bool | None]:
    """Our `bias` and `qkv_bias`: linear layers have biases all or none, or Qwen2 those of queries, keys and values."""
    if architecture is QWEN2:
        return False, True
    if architecture is MISTRAL:
        settings.must_be("attention_bias", (False,), False)
        settings.must_be("mlp_bias", (False,), False)
        return False, None
    attention = settings.must_be("attention_bias", (True, False), False)
    settings.must_be("mlp_bias", (attention,), False)
    return attention, None


def _read_rope(settings: Settings) -> dict[str, Any]:
    """From `rope_parameters` of newer files, or from `rope_theta` and `rope_scaling`."""
    found = Settings({**settings.get("rope_scaling", {}), **settings.get("rope_parameters", {})})
    unknown = sorted(found.fields - ROPE_NAMES)
    if unknown:
        allowed = ", ".join(sorted(ROPE_NAMES))
        raise ConfigError(f"config.json: rope_scaling.{unknown[0]}: unknown setting; must be {allowed}")
    for place in (settings, found):
        place.must_be("partial_rotary_factor", (1, 1.0), 1.0)
    theta = float(found.get("rope_theta", settings.get("rope_theta", 10_000.0)))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"config.json: rope_scaling.rope_type: {kind!r}; must be 'default', 'linear', 'llama3'")
    scaling = {"type": kind, "factor": float(found.get("factor", 1.0))}
    if kind == "llama3":
        scaling["low_freq_factor"] = float(found.get("low_freq_factor", 1.0))
        scaling["high_freq_factor"] = float(found.get("high_freq_factor", 4.0))
        scaling["original_seq_length"] = found.number("original_max_position_embeddings")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _read_window(settings: Settings, architecture: Architecture) -> dict[str, Any] | None:
    """Section `attention` where each token sees a window: our pattern `local` with that stride, at all times."""
    if architecture is QWEN2:
        settings.must_be("use_sliding_window", (False,), False)
    types = set(settings.get("layer_types", [])) - {"full_attention"}
    if types:
        raise ConfigError(f"config.json: layer_types: {', '.join(sorted(types))}; must be full_attention")
    # Where Mistral's config.json says nothing, transformers takes 4096.
    given = "sliding_window" in settings.fields
    if architecture is not MISTRAL or (given and settings.get("sliding_window") is None):
        return None
    window = settings.number("sliding_window") if given else 4096
    return {"stride": window, "windows": [{"start": 0.0, "end": 1.0, "pattern": "local"}]}
