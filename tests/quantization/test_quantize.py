"""Model folders quantised from end to end: masks survive, the folder opens everywhere, mistakes are refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import processes
import pytest
import torch
import trained_model

from megasparse.checkpoint.model_folder import ModelFolder, load_weights
from megasparse.checkpoint.quantized import QUANTIZATION
from megasparse.checkpoint.store import CheckpointError
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.conversion.inspection.verification import verify
from megasparse.conversion.sources import FolderSource, write_source
from megasparse.evaluation.run import place
from megasparse.inference.trained import open_trained
from megasparse.kernels.quantized import quantize_tokens, quantized
from megasparse.launching import LaunchEnvironment
from megasparse.layers import Linear
from megasparse.layers.quantized import QuantizedLinear, quantized_layers
from megasparse.models.build import build_model
from megasparse.pruning.run import prune
from megasparse.pruning.settings import PruneSettings
from megasparse.quantization.run import quantize
from megasparse.quantization.settings import QuantizeSettings
from megasparse.quantization.smoothing import behind_norms, smooth_, smoothing_scales

ROOT = Path(__file__).resolve().parents[2]
V = trained_model.VOCABULARY
GPT2 = {
    "normalization": "layernorm", "position_embedding": "learned", "activation": "gelu", "bias": True,
    "ffn_hidden_size": 96, "tie_embeddings": True, "num_layers": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA = {"num_layers": 2, "ffn_hidden_size": 96}


def random_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """Weights of a size that makes every part matter; a few inputs behind norms are large, as in real models."""
    model = build_model(config, V)
    # A fixture is made before a test is seeded.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.15, generator=generator)
            if "norm" in name:
                parameter[:3] *= 25
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module", params=["gpt2", pytest.param("llama", marks=pytest.mark.exhaustive)])
def sparse_model(request, tmp_path_factory) -> Path:
    """A random model pruned to half of its weights, `half`, and a text."""
    folder = tmp_path_factory.mktemp(request.param)
    config = trained_model.model_config(**{"llama": LLAMA, "gpt2": GPT2}[request.param])
    trained_model.write_folder(folder / "dense", config, random_weights(config))
    settings = PruneSettings(folder / "dense", folder / "half", method="magnitude", density=0.5)
    prune(settings, LaunchEnvironment.from_variables({}))
    text = "".join(f"{a} and {b} are {a + b}.\n" for a in range(40) for b in range(20))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder


def settings(folder: Path, output: Path, **changes) -> QuantizeSettings:
    if any(changes.get(name) for name in ("smoothing", "rounding")):
        changes = {"calibration": str(folder / "text.txt"), "samples": 6, "window": 40, **changes}
    return dataclasses.replace(QuantizeSettings(folder / "half", output), **changes)


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return open_trained(folder).model(tokens)[..., :V]


def plain_logits(folder: ModelFolder, tokens: torch.Tensor, *, int8: bool) -> torch.Tensor:
    """An ordinary model with the folder's numbers as float32 weights; inputs of its linear layers rounded before."""
    model = build_model(folder.config, V)
    load_weights(model, folder)

    def rounded(_, inputs):
        x = inputs[0]
        step = x.abs().amax(-1, keepdim=True) / 127
        return ((x / step).round() * step,)

    for module in model.layers.modules():
        if int8 and isinstance(module, Linear):
            module.register_forward_pre_hook(rounded)
    with torch.no_grad():
        return model(tokens)[..., :V]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smoothing": 0.5},
        {"activations": "float"},
        {"bits": 4},
        {"bits": 3, "group": 16, "rounding": "discquant", "steps": 3, "batch": 1},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "int8",
)
def test_masks_survive_and_the_folder_is_a_model(sparse_model, tmp_path, options) -> None:
    output = tmp_path / "quantised"
    quantize(settings(sparse_model, output, **options))
    before, after = ModelFolder(sparse_model / "half"), ModelFolder(output)
    after.check_files()
    assert verify(output) == [] and after.names == before.names
    assert not list(tmp_path.glob(".*"))
    assert all(torch.equal(bits, after.topology()[key]) for key, bits in before.topology().items())
    described = after.quantization
    assert described is not None and described.bits == options.get("bits", 8)
    smooth = "smoothing" in options
    for name in before.names:
        old, new = before.tensor(name), after.tensor(name)
        if name not in described.parameters:
            assert torch.equal(old, new) or (smooth and "layers" in name and "norm" in name), name
            continue
        assert not new[old == 0].any(), f"{name}: a zero has moved"
        assert after.dtype(name) == torch.float32 and new.shape == old.shape
        assert (new != old).any() and (new - old).norm() < (0.6 if described.bits == 3 else 0.2) * old.norm() or smooth
    assert {f"{layer}.weight" for layer in described.layers} == {n for n in before.names if "attention." in n and
        n.endswith("weight") or "mlp." in n and n.endswith("weight")}  # fmt: skip
    tokens = torch.randint(V, (2, 30))
    expected = plain_logits(after, tokens, int8=described.activations == "int8")
    # In float the roundings of sums. In int8 some inputs lie between two levels within those, and go the other way;
    # without quantised activations the distance is above 0.1.
    tolerance = 0.02 if described.activations == "int8" else 1e-4
    assert (logits(output, tokens) - expected).norm() < tolerance * expected.norm()
    # Tools that know nothing of it write it as an ordinary folder, with the same numbers and zeros.
    write_source(FolderSource(output), tmp_path / "again")
    again = ModelFolder(tmp_path / "again")
    assert again.quantization is None and all(torch.equal(again.tensor(n), after.tensor(n)) for n in after.names)


def test_levels_lie_there_as_they_are(sparse_model, tmp_path) -> None:
    """Bytes of the file, and the layer's product against the formula."""
    quantize(settings(sparse_model, tmp_path / "out", keep_float=("layers.1.*",)))
    folder, before = ModelFolder(tmp_path / "out"), ModelFolder(sparse_model / "half")
    matrices = dict(folder.quantized_layers())
    assert matrices and all(name.startswith("layers.0.") for name in matrices)
    model, x = open_trained(tmp_path / "out").model, torch.randn(2, 7, 64)
    for name, matrix in matrices.items():
        expected = quantized(before.tensor(f"{name}.weight"), 8)
        assert torch.equal(matrix.values, expected.values) and torch.equal(matrix.scales, expected.scales)
    for name, (values, scales) in quantized_layers(model).items():
        assert torch.equal(values, matrices.pop(name).values) and scales.dtype == torch.float32
    assert not matrices
    matrices = dict(folder.quantized_layers())
    layer = model.layers[0].attention.qkv
    assert isinstance(layer, QuantizedLinear)
    levels, scales = quantize_tokens(x)
    matrix = matrices["layers.0.attention.qkv"]
    y = (levels.double() @ matrix.values.double().T) * scales * matrix.scales
    torch.testing.assert_close(layer(x).double(), y + (0 if layer.bias is None else layer.bias), rtol=1e-5, atol=1e-5)
    held = sum(m.values.numel() + 4 * m.scales.numel() for m in matrices.values())
    rest = sum(before.tensor(n).nbytes for n in before.names if n.removesuffix(".weight") not in matrices)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert held + rest < size < held + rest + 6000


def test_scales_stay_exact_in_another_precision(sparse_model, tmp_path) -> None:
    quantize(settings(sparse_model, tmp_path / "out"))
    model = open_trained(tmp_path / "out").model
    scales = {name: module.scales.clone() for name, module in model.named_modules() if hasattr(module, "scales")}
    place(model, torch.device("cpu"), "bf16")
    assert scales and all(torch.equal(model.get_submodule(name).scales, kept) for name, kept in scales.items())
    assert model(torch.randint(V, (1, 9))).dtype == torch.bfloat16


def test_smoothing_leaves_the_function_and_helps(sparse_model, tmp_path) -> None:
    """In float the smoothed model is the model; in int8 it is nearer to it, as a few inputs are large."""
    tokens = torch.randint(V, (3, 40))
    expected = logits(sparse_model / "half", tokens)
    errors = {}
    for name, smoothing in (("plain", None), ("smooth", 0.5)):
        quantize(settings(sparse_model, tmp_path / name, smoothing=smoothing))
        errors[name] = float((logits(tmp_path / name, tokens) - expected).norm() / expected.norm())
    assert errors["smooth"] < 0.7 * errors["plain"], errors


def test_smoothing_in_float_is_the_same_function(sparse_model) -> None:
    trained = open_trained(sparse_model / "half")
    tokens = torch.randint(V, (2, 40))
    with torch.no_grad():
        before = trained.model(tokens)
        for block in trained.model.layers:
            for norm, layer in behind_norms(block):
                largest, zeros = torch.rand(64) * 20, layer.weight == 0
                largest[5] = 0
                largest_weights = layer.weight.abs().amax(0)
                scales = smoothing_scales(largest, layer.weight, 0.7)
                torch.testing.assert_close(scales[1:5], largest[1:5] ** 0.7 / largest_weights[1:5] ** 0.3)
                assert scales[5] == 1
                smooth_(norm, layer, scales)
                assert torch.equal(layer.weight == 0, zeros)
        # A division and a product more for each input: some roundings of float32 in sums of 64 to 96.
        torch.testing.assert_close(trained.model(tokens), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


MISTAKES = [
    ({"bits": 5}, "--bits: 5; must be one of 3, 4, 8"),
    ({"bits": 4, "activations": "int8"}, "--activations: int8 with --bits 4; must be float"),
    ({"group": 16, "activations": "int8"}, "--activations: int8 with --group 16; must be float"),
    ({"bits": 4, "smoothing": 0.5}, "--smoothing: 0.5; must be left out"),
    ({"smoothing": 1.0}, "--smoothing: 1; must be above 0 and below 1"),
    ({"smoothing": 0.5, "calibration": None, "samples": None, "window": None}, "--calibration: missing; --smoothing"),
    ({"rounding": "discquant"}, "--rounding: discquant with --bits 8; must be nearest, or 3 or 4 bits"),
    ({"rounding": "up"}, "--rounding: up; must be one of nearest, discquant"),
    ({"samples": 3}, "--samples: 3; must be left out: it is for --calibration"),
    ({"steps": 3}, "--steps: 3; must be left out: it is for --rounding discquant"),
    ({"bits": 4, "rounding": "discquant", "lr": 0.0}, "--lr: 0; must be above 0"),
    ({"bits": 4, "group": 24}, "--group: 24 does not divide the 64 inputs of layer layers.0.attention.qkv; must be"),
    ({"keep_float": ("head",)}, "--keep-float: no layer falls to 'head'; must be patterns"),
    ({"keep_float": ("*",)}, "--keep-float: every layer stays as it is; must be"),
    ({"smoothing": 0.5, "samples": 10**6}, "--calibration: .* must have at least 40,000,000"),
    ({"smoothing": 0.5, "window": 49}, "--window: 49; must be at most 48"),
    ({"model": Path("nothing")}, "--model: nothing: no model folder there"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_are_refused_and_nothing_is_written(sparse_model, tmp_path, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(settings(sparse_model, tmp_path / "out", **changes))
    assert not list(tmp_path.iterdir())


def test_what_is_quantised_already_or_contradicts_its_mask_is_refused(sparse_model, tmp_path) -> None:
    quantize(settings(sparse_model, tmp_path / "once"))
    with pytest.raises(ConfigError, match="must be a model that is not quantised yet"):
        quantize(settings(sparse_model, tmp_path / "twice", model=tmp_path / "once"))
    source = ModelFolder(sparse_model / "dense")
    weights = {name: source.tensor(name) for name in source.names}
    config = ModelFolder(sparse_model / "half").config
    topology = ModelFolder(sparse_model / "half").topology()
    trained_model.write_folder(tmp_path / "wrong", config, weights, topology)
    with pytest.raises(CheckpointError, match=r"weights outside of its mask that are not 0; must be"):
        quantize(settings(sparse_model, tmp_path / "out", model=tmp_path / "wrong"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "bits"),
        ({"bits": 4}, r"qkv.weight is .*; must be"),
        ({"more": 1}, "more"),
        ({"activations": "int4"}, "activations"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(sparse_model, tmp_path, changes, message) -> None:
    quantize(settings(sparse_model, tmp_path / "out"))
    path = tmp_path / "out" / QUANTIZATION
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        ModelFolder(tmp_path / "out")


def test_the_tool_quantises_and_says_so(sparse_model, tmp_path) -> None:
    words = ["--model", sparse_model / "half", "--output", tmp_path / "out", "--calibration", sparse_model / "text.txt"]
    words += ["--samples", 4, "--window", 20, "--smoothing", 0.5]
    done = processes.run([sys.executable, str(ROOT / "tools" / "quantize.py"), *map(str, words)])
    assert "block 2 of 2: 4 layers quantised, relative error of what it adds" in done.stdout, done.stdout
    assert "8 layers of 8 bits" in done.stdout
