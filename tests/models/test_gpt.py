"""The model as a whole: names, shapes, initial weights, patterns, recomputation, sparsity and precision."""

from __future__ import annotations

import pytest
import torch
from next_token import next_token_loss

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.kernels.block_sparse import apply_mask_
from megasparse.layers import LayerFactory, SparseSpec
from megasparse.models import GPT

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 24, "vocab_size_multiple": 16}
LLAMA = {
    "position_embedding": "rope", "normalization": "rmsnorm", "activation": "swiglu", "bias": False,
    "tie_embeddings": False, "num_key_value_heads": 2, "ffn_hidden_size": 48,
}  # fmt: skip
STYLES = {"gpt2": {}, "llama": LLAMA}
MIXED = [("full", "sparse", "local", "sparse"), ("fixed", "strided", "full", "full")]
V = 43


def build(style="gpt2", *, rule=lambda name: None, seed=0, **options) -> GPT:
    config = ModelConfig(**SHAPE, **STYLES[style])
    return GPT(config, AttentionConfig(stride=4), V, LayerFactory(rule, seed), **options)


def unit8(name: str) -> SparseSpec:
    return SparseSpec(8)


def sparsify(model: GPT, density: float = 0.4) -> None:
    for layer in model.sparse_layers().values():
        layer.mask.copy_(torch.rand(layer.mask.shape) < density)
        layer.mask[0, 0], layer.mask[-1, -1] = False, True
        layer.topology_changed()
        apply_mask_(layer.weight.data, layer.mask, layer.block_size)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(V, (3, 20)), torch.randint(V, (3, 20))


def test_parameter_names() -> None:
    pair = ["weight", "bias"]
    layers = ["attention_norm", "attention.qkv", "attention.output", "mlp_norm", "mlp.up", "mlp.down"]
    expected = ["embedding.tokens.weight", "embedding.positions.weight"]
    expected += [f"layers.{i}.{layer}.{kind}" for i in range(2) for layer in layers for kind in pair]
    expected += ["final_norm.weight", "final_norm.bias"]
    model = build()
    assert [name for name, _ in model.named_parameters()] == expected
    assert model.head.weight is model.embedding.tokens.weight
    assert set(model.state_dict()) == {*expected, "head.weight"}

    layers = ["attention_norm", "attention.qkv", "attention.output", "mlp_norm", "mlp.gate_up", "mlp.down"]
    expected = ["embedding.tokens.weight", *(f"layers.{i}.{layer}.weight" for i in range(2) for layer in layers)]
    assert [name for name, _ in build("llama").named_parameters()] == [*expected, "final_norm.weight", "head.weight"]


def test_layer_names_given_to_the_factory() -> None:
    asked = []
    build(rule=lambda name: asked.append(name))
    blocks = [f"layers.{i}.{part}" for i in range(2) for part in ("attention.qkv", "attention.output", "mlp.up")]
    assert {*blocks, "layers.1.mlp.down", "head"} <= set(asked)
    model = build(rule=lambda name: SparseSpec(4) if "mlp" in name else None)
    assert list(model.sparse_layers()) == [f"layers.{i}.mlp.{part}" for i in range(2) for part in ("up", "down")]


def test_gpt2_xl_on_meta() -> None:
    config = ModelConfig(num_layers=48, hidden_size=1600, num_attention_heads=25, vocab_size_multiple=1)
    with torch.device("meta"):
        model = GPT(
            config, AttentionConfig(), 50257, LayerFactory(lambda name: SparseSpec(32) if "mlp" in name else None)
        )
    # The published size of GPT-2 XL.
    assert model.num_parameters() == 1_557_611_200
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("style", STYLES)
def test_initial_values(style) -> None:
    config = ModelConfig(num_layers=2, hidden_size=256, num_attention_heads=4, seq_length=128, **STYLES[style])
    model = GPT(config, AttentionConfig(), 500, LayerFactory(seed=3))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / 2 if "output" in name or "down" in name else 0.02  # sqrt(2 * 2 layers) = 2
            # 12,288 draws or more: relative deviation of the estimate below 0.7 %.
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name


def test_initial_weights_do_not_depend_on_sparsity_order_or_global_seed() -> None:
    torch.manual_seed(1)
    plain = build(seed=7)
    torch.manual_seed(2)
    torch.randn(100)
    build(seed=8)
    sparse = build(rule=lambda name: SparseSpec(8, low_rank=2), seed=7).state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, sparse[name]), name
    other = build(seed=8)
    assert not torch.equal(other.layers[0].mlp.up.weight, plain.layers[0].mlp.up.weight)
    # Two layers of one shape are two draws, and a deeper model begins with the same weights.
    assert not torch.equal(plain.layers[0].mlp.up.weight, plain.layers[1].mlp.up.weight)
    deeper = GPT(ModelConfig(**{**SHAPE, "num_layers": 3}), AttentionConfig(), V, LayerFactory(seed=7))
    assert torch.equal(deeper.layers[1].mlp.up.weight, plain.layers[1].mlp.up.weight)


@pytest.mark.parametrize("style", STYLES)
def test_logits_loss_and_padded_rows(style) -> None:
    model = build(style)
    tokens, targets = batch()
    logits = model(tokens)
    assert logits.shape == (3, 20, V) and model.head.weight.shape == (48, 32)
    expected = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).mean()
    loss = next_token_loss(model, tokens, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert (model.head.weight.grad[V:] == 0).all() and model.head.weight.grad[:V].abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("style", STYLES)
def test_model_is_causal(style) -> None:
    model = build(style)
    model.set_attention_patterns(MIXED)
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % V
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert (before[:, 9] - after[:, 9]).abs().max() > 1e-4


def test_patterns_reach_the_attention() -> None:
    model = build()
    tokens, _ = batch()
    full = model(tokens)
    model.set_attention_patterns([("local",) * 4] * 2)
    local = model(tokens)
    # Inside the first window both are the same, beyond it they are not.
    torch.testing.assert_close(full[:, :4], local[:, :4], rtol=0, atol=1e-6)
    assert (full[:, 10:] - local[:, 10:]).abs().max() > 1e-6
    with pytest.raises(ValueError, match="got 1 layers, the model has 2"):
        model.set_attention_patterns([("full",) * 4])
    with pytest.raises(ValueError, match="4 heads"):
        model.set_attention_patterns([("full",) * 4, ("full",) * 2])


def test_too_long_a_sequence() -> None:
    with pytest.raises(ValueError, match="seq_length: 25 tokens exceed the 24"):
        build()(torch.zeros(1, 25, dtype=torch.int64))
    assert build("llama")(torch.zeros(1, 25, dtype=torch.int64)).shape == (1, 25, V)


@pytest.mark.parametrize("attention_kernel", ["reference", "tiled"])
@pytest.mark.parametrize("style", STYLES)
def test_recomputation_changes_nothing(style, attention_kernel) -> None:
    tokens, targets = batch()
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        options = {"recompute": recompute, "attention_kernel": attention_kernel}
        model = build(style, rule=lambda name: SparseSpec(8, low_rank=2), **options)
        sparsify(model)
        model.set_attention_patterns(MIXED)
        for block in model.layers:
            block.attention.offsets = (0, 1, 2, 3)
        loss = next_token_loss(model, tokens, targets)
        loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (loss, gradients), (loss_again, gradients_again) = results
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name


def test_recomputation_saves_activations() -> None:
    tokens, targets = batch()
    kept = []
    for recompute in (False, True):
        model, sizes = build(recompute=recompute), []
        own = {parameter.data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, own=own, sizes=sizes: sizes.append(0 if t.data_ptr() in own else t.numel()) or t, lambda t: t
        ):
            next_token_loss(model, tokens, targets)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("style", STYLES)
def test_inactive_weights_stay_exactly_zero(style) -> None:
    model = build(style, rule=unit8)
    sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    start = model.layers[0].mlp.down.weight.detach().clone()
    losses = []
    tokens, targets = batch()
    for _ in range(4):
        loss = next_token_loss(model, tokens, targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert len(model.sparse_layers()) == 9
    for name, layer in model.sparse_layers().items():
        keep = layer.mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert (layer.weight[~keep] == 0).all(), name
        assert (layer.weight[keep] != 0).all(), name
    assert not torch.equal(model.layers[0].mlp.down.weight, start)


def test_sparse_model_is_the_dense_model_with_those_zeros() -> None:
    sparse = build(rule=unit8)
    sparsify(sparse)
    dense = build()
    dense.load_state_dict(sparse.state_dict())
    tokens, targets = batch()
    first, second = next_token_loss(sparse, tokens, targets), next_token_loss(dense, tokens, targets)
    assert torch.equal(first, second)
    first.backward()
    second.backward()
    masks = {f"{name}.weight": layer.mask for name, layer in sparse.sparse_layers().items()}
    masks["embedding.tokens.weight"] = masks.pop("head.weight")
    for (name, parameter), other in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        expected = apply_mask_(other.grad, masks[name], 8) if name in masks else other.grad
        assert torch.equal(parameter.grad, expected), name


def test_tied_sparse_head_gets_no_gradient_in_inactive_units_from_either_use() -> None:
    model = build(rule=lambda name: SparseSpec(8) if name == "head" else None)
    sparsify(model)
    keep = model.head.mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    tokens, targets = batch()
    next_token_loss(model, tokens, targets).backward()
    gradient = model.embedding.tokens.weight.grad
    assert (gradient[~keep] == 0).all() and gradient[:V][keep[:V]].abs().min() > 0
    # Without its own mask the look-up would leave a gradient here: the topology update shows it.
    model.head.collect_dense_gradient = True
    model.zero_grad()
    model.embedding(tokens).sum().backward()
    assert model.embedding.tokens.weight.grad[~keep].abs().sum() > 0


@pytest.mark.parametrize("style", STYLES)
def test_bfloat16(style) -> None:
    model = build(style, rule=unit8)
    sparsify(model)
    model.set_attention_patterns(MIXED)
    tokens, targets = batch()
    logits, loss = model(tokens).detach(), next_token_loss(model, tokens, targets).detach()
    model.bfloat16()
    low = model(tokens)
    assert low.dtype == torch.bfloat16
    # Logits of size 0.5 after some twenty roundings of relative 2^-8.
    assert (low.float() - logits).abs().max() < 0.05 * logits.abs().max() + 0.01
    low_loss = next_token_loss(model, tokens, targets)
    assert low_loss.dtype == torch.float32
    assert abs(low_loss.item() - loss.item()) < 0.02
    low_loss.backward()
    for layer in model.sparse_layers().values():
        keep = layer.mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert layer.mask.dtype == torch.bool and (layer.weight.grad[~keep] == 0).all()
