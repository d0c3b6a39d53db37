"""Which tensors of an architecture correspond to which of ours.

    architecture = ARCHITECTURES["LlamaForCausalLM"]
    for entry in entries(architecture, model_tensors(config)):
        entry.ours, entry.theirs, entry.transposed

A table names modules; `weight` and `bias` of a module correspond alike. Several names on their side are fused on ours:
their rows follow each other. Rotary embeddings pair dimensions i and i + D/2 on both sides, so no rows are reordered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """An architecture of transformers."""

    name: str
    """As in `architectures` of config.json."""
    model_type: str
    modules: Mapping[str, tuple[str, ...]]
    """Our module -> theirs; {i} stands for the number of the layer."""
    transposed: frozenset[str] = frozenset()
    """Modules of ours whose weights they store as [inputs, outputs]."""
    has_biases: bool = False
    """Every module has a bias but the embeddings and the head: where ours has none, theirs is zero."""
    prefix: str = "model."
    """Of all their tensors but the head's; some files leave it out."""


@dataclass(frozen=True)
class Entry:
    """One tensor of ours, and those of theirs that it consists of."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool


_GPT2_MODULES = {
    "embedding.tokens": ("transformer.wte",),
    "embedding.positions": ("transformer.wpe",),
    "layers.{i}.attention_norm": ("transformer.h.{i}.ln_1",),
    "layers.{i}.attention.qkv": ("transformer.h.{i}.attn.c_attn",),
    "layers.{i}.attention.output": ("transformer.h.{i}.attn.c_proj",),
    "layers.{i}.mlp_norm": ("transformer.h.{i}.ln_2",),
    "layers.{i}.mlp.up": ("transformer.h.{i}.mlp.c_fc",),
    "layers.{i}.mlp.down": ("transformer.h.{i}.mlp.c_proj",),
    "final_norm": ("transformer.ln_f",),
    "head": ("lm_head",),
}
_LLAMA_MODULES = {
    "embedding.tokens": ("model.embed_tokens",),
    "layers.{i}.attention_norm": ("model.layers.{i}.input_layernorm",),
    "layers.{i}.attention.qkv": tuple(f"model.layers.{{i}}.self_attn.{kind}_proj" for kind in "qkv"),
    "layers.{i}.attention.output": ("model.layers.{i}.self_attn.o_proj",),
    "layers.{i}.mlp_norm": ("model.layers.{i}.post_attention_layernorm",),
    "layers.{i}.mlp.gate_up": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    "layers.{i}.mlp.down": ("model.layers.{i}.mlp.down_proj",),
    "final_norm": ("model.norm",),
    "head": ("lm_head",),
}

GPT2 = Architecture(
    "GPT2LMHeadModel",
    "gpt2",
    _GPT2_MODULES,
    transposed=frozenset(
        ("layers.{i}.attention.qkv", "layers.{i}.attention.output", "layers.{i}.mlp.up", "layers.{i}.mlp.down")
    ),
    has_biases=True,
    prefix="transformer.",
)
LLAMA = Architecture("LlamaForCausalLM", "llama", _LLAMA_MODULES)
MISTRAL = Architecture("MistralForCausalLM", "mistral", _LLAMA_MODULES)
QWEN2 = Architecture("Qwen2ForCausalLM", "qwen2", _LLAMA_MODULES)
NANOGPT = Architecture("nanoGPT", "nanogpt", _GPT2_MODULES, prefix="transformer.")
"""Not of transformers: names of GPT-2, plain linear layers, biases as the model has them."""

ARCHITECTURES = {architecture.name: architecture for architecture in (GPT2, LLAMA, MISTRAL, QWEN2)}

IGNORED = re.compile(r"(.*\.)?(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")
"""Buffers that older files hold besides the weights."""


def entries(architecture: Architecture, names: Iterable[str]) -> Iterator[Entry]:
    """For each of our tensors `names`, those of theirs that it corresponds to."""
    for name in names:
        module, _, kind = name.rpartition(".")
        number = re.match(r"layers\.(\d+)\.", module)
        general = re.sub(r"^layers\.\d+\.", "layers.{i}.", module)
        theirs = [f"{their}.{kind}" for their in architecture.modules[general]]
        if number:
            theirs = [their.replace("{i}", number[1]) for their in theirs]
        yield Entry(name, tuple(theirs), kind == "weight" and general in architecture.transposed)
