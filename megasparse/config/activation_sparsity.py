"""The section `activation_sparsity`: 2:4 sparse activations in training (Haziza et al. 2025, arXiv 2503.16672)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from megasparse.config.section import NonNegativeInt, Section


class ActivationSparsityConfig(Section):
    pattern: Literal["none", "2:4"] = "none"
    """2:4: of every four consecutive features inside an MLP the two largest take part in its products, and in weight
    gradients of every four tokens the two largest; `model.activation` must be relu2. Validation, samples and exported
    models take them whole."""
    warmup_steps: NonNegativeInt = 1000
    """Steps before it begins: an untrained MLP has few zeros."""
    kernel: Literal["reference", "semi_structured"] = "reference"
    """reference: dense products of tensors with zeros, which save nothing; semi_structured: sparse tensor cores of
    NVIDIA GPUs, by torch, in bf16 and fp16. The latter is untried, and the ledger counts products whole with either."""

    @field_validator("pattern", mode="before")
    @classmethod
    def _is_no_number(cls, value: Any) -> Any:
        # YAML 1.1 reads 2:4 without quotes as 2 x 60 + 4.
        return "2:4" if value == 124 else value
