"""Logits against the independent implementations of Hugging Face transformers, weights mapped here by hand."""

from __future__ import annotations

import pytest
import torch

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.layers import LayerFactory
from megasparse.models import GPT
from megasparse.utils.activations import ACTIVATIONS

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

V, T, TOLERANCE = 97, 40, 1e-5


def randomize(model: torch.nn.Module) -> None:
    """Fresh weights of a size that makes every part matter: norms and biases too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)


def assert_same(model: GPT, reference: torch.nn.Module) -> None:
    tokens = torch.randint(V, (2, T))
    with torch.no_grad():
        got, expected = model(tokens), reference(tokens).logits
    assert expected.std() > 0.3
    # float32 on both sides, logits of order 1 after two blocks.
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_gpt2() -> None:
    config = ModelConfig(num_layers=2, hidden_size=48, num_attention_heads=4, seq_length=T, vocab_size_multiple=1)
    model = GPT(config, AttentionConfig(), V, LayerFactory())
    randomize(model)
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V, n_positions=T, n_embd=48, n_layer=2, n_head=4)
    ).eval()
    ours = model.state_dict()
    names = {
        "ln_1": "attention_norm", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.output",
        "ln_2": "mlp_norm", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down",
    }  # fmt: skip
    theirs = {
        "transformer.wte.weight": ours["embedding.tokens.weight"],
        "transformer.wpe.weight": ours["embedding.positions.weight"],
        "transformer.ln_f.weight": ours["final_norm.weight"],
        "transformer.ln_f.bias": ours["final_norm.bias"],
        "lm_head.weight": ours["head.weight"],
    }
    for i in range(2):
        for their_name, our_name in names.items():
            weight = ours[f"layers.{i}.{our_name}.weight"]
            # GPT-2 stores its projections [in, out].
            theirs[f"transformer.h.{i}.{their_name}.weight"] = weight if weight.ndim == 1 else weight.t()
            theirs[f"transformer.h.{i}.{their_name}.bias"] = ours[f"layers.{i}.{our_name}.bias"]
    reference.load_state_dict(theirs)
    assert_same(model, reference)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_llama(groups) -> None:
    config = ModelConfig(
        num_layers=2, hidden_size=48, num_attention_heads=4, num_key_value_heads=groups, ffn_hidden_size=80,
        seq_length=T, vocab_size_multiple=1, position_embedding="rope", rope_theta=500.0, normalization="rmsnorm",
        activation="swiglu", bias=False, tie_embeddings=False, normalization_epsilon=1e-6,
    )  # fmt: skip
    model = GPT(config, AttentionConfig(), V, LayerFactory())
    randomize(model)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=groups, max_position_embeddings=T, rms_norm_eps=1e-6, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ).eval()  # fmt: skip
    ours = model.state_dict()
    theirs = {
        "model.embed_tokens.weight": ours["embedding.tokens.weight"],
        "model.norm.weight": ours["final_norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    for i in range(2):
        block = {name.removeprefix(f"layers.{i}."): w for name, w in ours.items() if name.startswith(f"layers.{i}.")}
        q, k, v = block["attention.qkv.weight"].split([48, 12 * groups, 12 * groups])
        gate, up = block["mlp.gate_up.weight"].chunk(2)
        parts = {
            "input_layernorm": block["attention_norm.weight"],
            "post_attention_layernorm": block["mlp_norm.weight"],
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
            "self_attn.o_proj": block["attention.output.weight"],
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": block["mlp.down.weight"],
        }  # fmt: skip
        theirs |= {f"model.layers.{i}.{name}.weight": weight for name, weight in parts.items()}
    reference.load_state_dict(theirs)
    assert_same(model, reference)


@pytest.mark.parametrize(
    ("name", "theirs"), [(n, their) for n, a in ACTIVATIONS.items() for their in a.transformers_names]
)
def test_activations_are_what_transformers_calls_so(name: str, theirs: str) -> None:
    x = torch.randn(1000, dtype=torch.float64) * 3
    found = ACTIVATIONS[name].function(x)
    torch.testing.assert_close(found, transformers.activations.ACT2FN[theirs](x))
