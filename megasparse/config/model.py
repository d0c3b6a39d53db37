"""The section `model`: the shape of the network; see ``schema``."""

from __future__ import annotations

from math import lcm
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megasparse.config.section import PositiveFloat, PositiveInt, Section


class RopeScaling(Section):
    """Lower rotary frequencies for contexts longer than those of the training."""

    type: Literal["linear", "llama3"]
    """linear: all frequencies are divided by the factor; llama3: low ones are, high ones stay, as in Llama 3.1."""
    factor: Annotated[float, Field(ge=1.0)]
    """Longest context over that of the training."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: fewer turns than this over `original_seq_length`, and the frequency is divided by the factor."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: more turns than this, and the frequency stays; between the two it is interpolated."""
    original_seq_length: PositiveInt = 8192
    """llama3: longest context of the training."""

    @model_validator(mode="after")
    def _factors_are_ordered(self) -> RopeScaling:
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor: {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}"
            )
        return self


class ModelConfig(Section):
    num_layers: PositiveInt = 12
    """Transformer blocks."""
    hidden_size: PositiveInt = 768
    """Width of the residual stream."""
    num_attention_heads: PositiveInt = 12
    """Query heads."""
    num_key_value_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention); unset: as many as query heads."""
    attention_head_dim: PositiveInt | None = None
    """Width of a head; unset: hidden_size / num_attention_heads."""
    ffn_hidden_size: PositiveInt | None = None
    """Width inside the MLP; unset: 4 x hidden_size, or 8/3 x hidden_size rounded up to 128 where gated (swiglu)."""
    seq_length: PositiveInt = 1024
    """Tokens per sample."""
    vocab_size: PositiveInt | None = None
    """Entries of the vocabulary; unset: the tokenizer's."""
    vocab_size_multiple: PositiveInt = 64
    """The embedding is padded to a multiple of this many rows."""
    position_embedding: Literal["learned", "rope"] = "learned"
    """learned: GPT-2; rope: rotary (Llama)."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Rotary frequencies for longer contexts; unset: as rope_theta gives them."""
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, before the MLP and before the head."""
    normalization_position: Literal["pre", "post"] = "pre"
    """post: normalisation after each residual sum instead, and none before the head."""
    residual_weight: Literal["none", "admin"] = "none"
    """admin: learnable weights of the residual sums, set by the variances of the first forward pass (post only)."""
    normalization_epsilon: PositiveFloat = 1e-5
    """Added to the variance."""
    activation: Literal["gelu", "gelu_exact", "relu2", "swiglu"] = "gelu"
    """gelu is the tanh approximation of GPT-2, gelu_exact none (nanoGPT); relu2 is the square of ReLU; swiglu
    has a fused gate and up projection."""
    bias: bool = True
    """Biases in linear layers and in layernorm."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values; unset: as `bias` (Qwen2: true where `bias` is false)."""
    tie_embeddings: bool = True
    """The head shares the weight of the token embedding."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; residual projections get init_std / sqrt(2 num_layers)."""

    @model_validator(mode="after")
    def _shapes_divide(self) -> ModelConfig:
        if self.attention_head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} does not divide hidden_size {self.hidden_size}; "
                f"must be one of {divisors(self.hidden_size)}"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}; must be one of {divisors(self.num_attention_heads)}"
            )
        if self.position_embedding == "rope" and self.attention_head_dim is not None and self.head_dim % 2:
            raise ValueError(f"attention_head_dim: rope needs an even one, got {self.head_dim}; must be even ones")
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise ValueError(
                f"hidden_size: rope needs an even head dimension, {self.hidden_size} / {self.num_attention_heads} = "
                f"{self.head_dim}; must be multiples of {2 * self.num_attention_heads}"
            )
        return self

    @property
    def head_dim(self) -> int:
        return self.attention_head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def mlp_width(self) -> int:
        """Width inside the MLP after the default is filled in."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        # Here, as it imports torch: tools that write data read settings and need neither.
        from megasparse.utils.activations import ACTIVATIONS

        if ACTIVATIONS[self.activation].gated:
            return -(-8 * self.hidden_size // (3 * 128)) * 128
        return 4 * self.hidden_size

    def padded_vocab_size(self, vocab_size: int, tensor_parallel_size: int = 1) -> int:
        """Rows of the embedding for a tokenizer of `vocab_size` entries, divisible over the tensor-parallel ranks."""
        multiple = lcm(self.vocab_size_multiple, tensor_parallel_size)
        return -(-vocab_size // multiple) * multiple


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
