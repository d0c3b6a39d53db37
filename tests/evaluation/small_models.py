"""Small transformers models of random weights, and our models with the same weights."""

from __future__ import annotations

import torch

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.layers import LayerFactory
from megasparse.models import GPT


def random_gpt2(vocab_size: int, seq_length: int) -> torch.nn.Module:
    """A GPT2LMHeadModel in which every weight has an effect; its last token ends a document."""
    import transformers

    shape = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=seq_length, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def model_with_weights_of(reference: torch.nn.Module) -> GPT:
    """Our GPT-2 with the weights of a transformers GPT2LMHeadModel."""
    shape = reference.config
    config = ModelConfig(
        num_layers=shape.n_layer, hidden_size=shape.n_embd, num_attention_heads=shape.n_head,
        seq_length=shape.n_positions, vocab_size_multiple=1,
    )  # fmt: skip
    model = GPT(config, AttentionConfig(), shape.vocab_size, LayerFactory())
    theirs = reference.state_dict()
    names = {
        "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.output": "attn.c_proj",
        "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
    }  # fmt: skip
    ours = {
        "embedding.tokens.weight": theirs["transformer.wte.weight"],
        "head.weight": theirs["lm_head.weight"],
        "embedding.positions.weight": theirs["transformer.wpe.weight"],
        "final_norm.weight": theirs["transformer.ln_f.weight"],
        "final_norm.bias": theirs["transformer.ln_f.bias"],
    }
    for layer in range(shape.n_layer):
        for our_name, their_name in names.items():
            weight = theirs[f"transformer.h.{layer}.{their_name}.weight"]
            # GPT-2 stores its projections [in, out].
            ours[f"layers.{layer}.{our_name}.weight"] = weight if weight.ndim == 1 else weight.t()
            ours[f"layers.{layer}.{our_name}.bias"] = theirs[f"transformer.h.{layer}.{their_name}.bias"]
    model.load_state_dict(ours)
    return model.eval()
