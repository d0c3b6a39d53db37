"""Models with packed layers against the same ones with dense layers: tokens, logits, what is packed and refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tool_calls import call
from torch import Tensor

from megasparse.checkpoint.model_folder import ModelFolderWriter
from megasparse.config.loader import check_config
from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.evaluation.run import EvaluationSettings, evaluate
from megasparse.inference import compression
from megasparse.inference.compressed_linear import CompressedLinear
from megasparse.inference.compression import compress_model
from megasparse.inference.generation import generate
from megasparse.kernels.quantized import quantize_tokens
from megasparse.kernels.sparse_inference import why_not
from megasparse.launching import LaunchEnvironment
from megasparse.layers import LayerFactory, Linear
from megasparse.models import GPT
from megasparse.models.build import build_model

REASON = why_not("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
V, T, C = 90, 32, 64
PATTERNS = ("unstructured", "2:4", "16:32", "16:64", "blocks of 16")


def pruned(pattern: str, **options) -> GPT:
    """All linear layers of the blocks; biases are random, so that they count."""
    torch.manual_seed(3)
    shape = {"num_layers": 2, "hidden_size": C, "num_attention_heads": 4, "seq_length": T, "init_std": 0.3}
    model = GPT(ModelConfig(**shape, **options), AttentionConfig(), V, LayerFactory(seed=2)).eval()
    for layer in model.layers.modules():
        if isinstance(layer, Linear):
            layer.weight.data.mul_(mask_like(layer.weight, pattern))
            if layer.bias is not None:
                layer.bias.data.normal_(std=0.1)
    return model


def mask_like(weight: Tensor, pattern: str) -> Tensor:
    outputs, inputs = weight.shape
    if pattern == "unstructured":
        return torch.rand(outputs, inputs) < 0.25
    if pattern.startswith("blocks"):
        return (torch.rand(outputs // 16, inputs // 16) < 0.4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    active, group = map(int, pattern.split(":"))
    return (torch.rand(outputs, inputs // group, group).argsort(-1).argsort(-1) < active).view(outputs, inputs)


def packed(model: GPT, *arguments, **options) -> GPT:
    """A copy of it."""
    other = copy.deepcopy(model)
    compress_model(other, *arguments, **options)
    return other


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_tokens_are_those_of_dense_products(pattern) -> None:
    """A prompt of many tokens, then one at a time, for one text and for three."""
    model = pruned(pattern)
    sparse, text = packed(model, "sparse"), torch.randint(V, (3, 9))
    assert sum(isinstance(layer, CompressedLinear) for layer in sparse.modules()) == 8
    for prompt in (text, text[:1]):
        tokens = [generate(each, prompt, 20, temperature=0) for each in (model, sparse)]
        assert torch.equal(*tokens)
    with torch.no_grad():
        # Of float32: sums of at most 256 products in another order, over 2 blocks; logits are of order 10.
        torch.testing.assert_close(sparse(text), model(text), rtol=1e-4, atol=1e-4)


def test_gated_layers_without_biases_in_bfloat16() -> None:
    """Weights stay as they are; activations are bfloat16 between the layers, rounded once after each product."""
    model = pruned("unstructured", activation="swiglu", bias=False, normalization="rmsnorm").to(torch.bfloat16)
    sparse, text = packed(model, "sparse"), torch.randint(V, (2, 9))
    with torch.no_grad():
        found, exact = sparse(text).float(), copy.deepcopy(model).double()(text).float()
        ordinary = model(text).float()
    # No farther from the exact logits than torch's products, by a half.
    assert float((found - exact).norm()) < 1.5 * float((ordinary - exact).norm())


def test_the_plan_says_what_lies_in_memory() -> None:
    model = pruned("blocks of 16")
    plan = compress_model(model, "sparse")
    assert [layer.name for layer in plan.layers][:2] == ["layers.0.attention.qkv", "layers.0.attention.output"]
    for layer in plan.layers:
        assert layer.is_packed and layer.kind == "blocks" and layer.block_size == 16
        module = model.get_submodule(layer.name)
        assert layer.num_bytes == module.weight.num_bytes < 0.75 * layer.dense_bytes
        assert not any(name.endswith("weight") for name, _ in module.named_parameters())
    first, *others = plan.lines()
    assert first.startswith("2 x attention.qkv: blocks of 16, float32, density 0.") and " MB of 0.10 MB" in first
    assert len(others) == 3


def test_a_layer_that_is_too_wide_for_the_kernels_stays_dense(monkeypatch) -> None:
    monkeypatch.setattr(compression, "MAX_INPUTS", 255)
    model = pruned("blocks of 16")
    plan = compress_model(model, "sparse")
    assert {layer.name.partition("mlp.")[2] for layer in plan.layers if "mlp" in layer.name} == {"up"}


def test_auto_leaves_small_and_dense_layers_alone() -> None:
    model, large = pruned("unstructured"), pruned("unstructured", ffn_hidden_size=2048)
    assert compress_model(model).num_packed == 0
    plan = compress_model(large)
    assert [layer.name for layer in plan.layers if layer.is_packed] == [
        f"layers.{i}.mlp.{part}" for i in range(2) for part in ("up", "down")
    ]
    dense = GPT(large.config, AttentionConfig(), V, LayerFactory(seed=2))
    assert compress_model(dense).num_packed == 0


def test_int8_layers_take_the_place_of_whatever_is_there() -> None:
    """Against the same model with weights of float32 and inputs that are rounded as theirs are."""
    model, text = pruned("unstructured"), torch.randint(V, (2, 9))
    layers = {layer.name: layer for layer in model.layers.modules() if isinstance(layer, Linear)}
    integers = {}
    for name, layer in layers.items():
        scales = layer.weight.detach().abs().amax(1) / 127
        integers[name] = (layer.weight.detach() / scales[:, None]).round().to(torch.int8), scales
    found = packed(model, "auto", integers)
    for name, layer in layers.items():
        values, scales = integers[name]
        layer.weight.data = values * scales[:, None]
        layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    with torch.no_grad():
        difference = (found(text) - model(text)).abs().max()
        # An input that lies between two steps may fall to either side, which is half a percent of the largest one.
        assert float(difference) < 0.02 * float(model(text).abs().max())
    assert all(found.get_submodule(name).weight.dtype == torch.int8 for name in layers)


def rounded(x: Tensor) -> Tensor:
    levels, scales = quantize_tokens(x)
    return levels * scales


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model of bytes whose perceptrons are large enough for `auto`."""
    shape = {"num_layers": 1, "hidden_size": C, "num_attention_heads": 4, "seq_length": T, "vocab_size": 257}
    config = check_config(
        {
            "model": {**shape, "ffn_hidden_size": 2048, "init_std": 0.3},
            "data": {"tokenizer": "bytes"},
            "sparsity": {"algorithm": "dense"},
        }
    )
    weights = {name: parameter.detach() for name, parameter in build_model(config, 257).named_parameters()}
    path = tmp_path_factory.mktemp("models") / "pruned"
    with ModelFolderWriter(path, config, dict.fromkeys(weights, torch.float32), facts={"step": 1}) as writer:
        for name in writer.names:
            weight = weights[name][: writer.specs[name].shape[0]]
            writer.write(
                name, weight * mask_like(weight, "unstructured") if ".mlp." in name and weight.ndim == 2 else weight
            )
    return path


def test_generate_samples_the_same_text_by_either_kernels(folder) -> None:
    words = ["--run", folder, "--prompt", "ab", "--tokens", "20", "--temperature", "0", "--device", "cpu"]
    status, dense = call("../launch/generate", *words, "--kernels", "dense")
    assert status == 0 and "unstructured" not in dense
    status, sparse = call("../launch/generate", *words)
    assert status == 0 and "1 x mlp.up: unstructured, float32, density 0.2" in sparse
    assert sparse.splitlines()[-1] == dense.splitlines()[-1] and len(dense.splitlines()[-1]) > 5


def test_evaluate_finds_the_same_loss_by_either_kernels(folder, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog looked at it. " * 3)
    records = [
        evaluate(
            EvaluationSettings(
                folder, "perplexity", str(tmp_path / "text.txt"), kernels=kernels, output=tmp_path / "x"
            ),
            LaunchEnvironment(0, 0, 1),
        )
        for kernels in ("dense", "auto")
    ]
    assert [record["settings"]["packed_layers"] for record in records] == [0, 2]
    dense, sparse = (record["results"]["loss"] for record in records)
    # Logits of order 10 in float32.
    assert dense == pytest.approx(sparse, rel=1e-5) and dense != 0


def test_refusals() -> None:
    model = pruned("unstructured")
    with pytest.raises(ValueError, match="kernels: fast; must be one of auto, dense, sparse"):
        compress_model(model, "fast")
    with pytest.raises(ValueError, match="sparse; no linear layer of the model has zeros"):
        compress_model(GPT(model.config, AttentionConfig(), V, LayerFactory(seed=2)), "sparse")
    values = torch.ones(1, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="quantized: head; must be linear layers"):
        compress_model(model, "auto", {"head": (values, torch.ones(1))})
    with pytest.raises(ValueError, match="must be auto or dense here: they run on cpu, not on meta"):
        compress_model(copy.deepcopy(model).to("meta"), "sparse")
    assert compress_model(model, "dense").num_packed == 0
