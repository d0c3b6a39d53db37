"""Conversion from and to transformers: logits, bytes, greedy tokens, at several numbers of ranks; what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from harness import run_distributed  # noqa: E402
from random_models import CASES, T, V, content, our_model, random_model, save  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from megasparse.checkpoint.model_folder import ModelFolder  # noqa: E402
from megasparse.checkpoint.store import CheckpointError  # noqa: E402
from megasparse.config.loader import ConfigError  # noqa: E402
from megasparse.conversion.huggingface.exporting import export_huggingface  # noqa: E402
from megasparse.conversion.huggingface.importing import import_huggingface, import_nanogpt  # noqa: E402
from megasparse.conversion.huggingface.settings import read_settings  # noqa: E402
from megasparse.conversion.sources import open_source  # noqa: E402
from megasparse.inference.generation import generate  # noqa: E402
from megasparse.launching import LaunchEnvironment, open_mesh  # noqa: E402

TOLERANCE = 1e-5


def tokens() -> torch.Tensor:
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))


def assert_same_logits(got: torch.nn.Module, reference: torch.nn.Module) -> None:
    with torch.no_grad():
        a, b = got(tokens()), reference(tokens())
    a, b = (x if isinstance(x, torch.Tensor) else x.logits for x in (a, b))
    assert b.std() > 0.3
    # float32 on both sides, logits of order 1 after two blocks.
    torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_in_both_directions_and_tokens_too(tmp_path, case) -> None:
    theirs = save(case, tmp_path / "theirs")
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    model = our_model(tmp_path / "ours")
    assert_same_logits(model, theirs)
    export_huggingface(open_source(tmp_path / "ours"), tmp_path / "exported")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert type(again) is type(theirs)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(again.eval(), theirs)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters(), strict=True))
    prompt = tokens()[:1, :5]
    wanted = again.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(model, prompt, 12, temperature=0.0), wanted)


@pytest.mark.parametrize(
    "case",
    [
        "gpt2",
        "llama3",
        pytest.param("mistral-window", marks=pytest.mark.exhaustive),
        pytest.param("qwen2", marks=pytest.mark.exhaustive),
    ],
)
def test_ten_round_trips_change_no_byte(tmp_path, case) -> None:
    save(case, tmp_path / "theirs", max_shard_size="60KB")
    import_huggingface(tmp_path / "theirs", tmp_path / "ours-0", max_file_bytes=50_000)
    export_huggingface(open_source(tmp_path / "ours-0"), tmp_path / "exported-0", max_file_bytes=50_000)
    assert len(list((tmp_path / "exported-0").glob("*.safetensors"))) > 2
    ours, exported = content(tmp_path / "ours-0"), content(tmp_path / "exported-0")
    for number in range(1, 11):
        import_huggingface(tmp_path / f"exported-{number - 1}", tmp_path / f"ours-{number}", max_file_bytes=50_000)
        export_huggingface(
            open_source(tmp_path / f"ours-{number}"), tmp_path / f"exported-{number}", max_file_bytes=50_000
        )
        assert content(tmp_path / f"ours-{number}") == ours
        assert content(tmp_path / f"exported-{number}") == exported


def divided_logits(size: int, folders: list[str]) -> dict[str, torch.Tensor]:
    """Logits of the models of these folders, each divided over `size` ranks."""
    with open_mesh(LaunchEnvironment.from_variables(os.environ), 60, size) as mesh, torch.no_grad():
        logits = {name: our_model(Path(name), mesh.tensor_parallel)(tokens()) for name in folders}
        mesh.barrier()
    return logits


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.exhaustive), 4])
def test_logits_agree_where_ranks_share_the_model(tmp_path, size) -> None:
    expected, folders = {}, []
    for case in CASES:
        theirs = save(case, tmp_path / f"{case}-theirs")
        import_huggingface(tmp_path / f"{case}-theirs", tmp_path / case)
        folders.append(str(tmp_path / case))
        with torch.no_grad():
            expected[folders[-1]] = theirs(tokens()).logits
    assert V % size
    for logits in run_distributed(divided_logits, size, size, folders, with_mesh=False):
        for name, wanted in expected.items():
            torch.testing.assert_close(logits[name], wanted, rtol=TOLERANCE, atol=TOLERANCE)


def _set(**fields):
    """A change of config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def _lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def _truncate(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def _edit_weights(change):
    def edit(folder: Path) -> None:
        (folder / "model.safetensors.index.json").unlink()
        files = sorted(folder.glob("model-*.safetensors"))
        tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name][1:].contiguous()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_set(architectures=["FalconForCausalLM"]), r"architectures: \['FalconForCausalLM'\]; must be .*Llama"),
        (_set(architectures=None), "architectures: .*must be"),
        (_set(model_type="mamba"), "model_type: 'mamba'; must be one of 'llama'"),
        (_set(hidden_act="relu"), "hidden_act: 'relu'; must be one of 'silu'"),
        (_set(mlp_bias=True), "mlp_bias: True; must be one of False"),
        (_set(rope_parameters={"rope_type": "yarn"}), "rope_type: 'yarn'; must be 'default', 'linear', 'llama3'"),
        (_set(rope_scaling={"type": "linear", "factor": 2, "beta_fast": 3}), "beta_fast: unknown setting"),
        (_set(partial_rotary_factor=0.5), "partial_rotary_factor: 0.5; must be one of 1"),
        (_set(quantization_config={"bits": 4}), "quantization_config: is set"),
        (_set(auto_map={"AutoModel": "x.py"}), "auto_map: is set"),
        (_set(hidden_size=-3), "hidden_size: -3; must be whole numbers"),
        (_set(num_key_value_heads=3), "num_key_value_heads: 3 does not divide"),
        (_set(num_hidden_layers=3), "model.layers.2.* is missing"),
        (_set(num_hidden_layers=1), "LlamaForCausalLM has no tensors model.layers.1"),
        (_set(layer_types=["sliding_attention"]), "layer_types: sliding_attention"),
        (_lose_a_shard, "model-00002-of-.*safetensors is missing"),
        (_truncate, "not a whole safetensors file"),
        (_edit_weights(_narrow), r"k_proj.weight has shape \[47, 48\], config.json asks for \[48, 48\]"),
        (_edit_weights(lambda tensors: tensors.pop("model.norm.weight")), "model.norm.weight is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not readable as JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: not readable"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_the_output_left_alone(tmp_path, llama, damage, reason) -> None:
    shutil.copytree(llama, tmp_path / "theirs")
    damage(tmp_path / "theirs")
    output = tmp_path / "ours"
    output.mkdir()
    (output / "precious").write_text("precious")
    with pytest.raises(ValueError, match=reason):
        import_huggingface(tmp_path / "theirs", output, replace=True)
    assert content(output) == {"precious": b"precious"}
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "ours"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A small Llama in several files."""
    folder = tmp_path_factory.mktemp("llama")
    save("llama2", folder, max_shard_size="60KB")
    return folder


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function: 'relu'; must be one of 'gelu_new'"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: True"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window: True; must be one of False"),
        ("mistral", {"attention_bias": True}, "attention_bias: True; must be one of False"),
    ],
)
def test_settings_of_other_architectures_are_refused(case, change, reason) -> None:
    values = {**random_model(case).config.to_dict(), **change}
    values["architectures"] = [type(random_model(case)).__name__]
    with pytest.raises(ConfigError, match=reason):
        read_settings(values)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path) -> None:
    """torch's own format holds a pickle; this one would make a file when it is loaded the unsafe way."""
    trap = tmp_path / "sprung"
    folder = tmp_path / "theirs"
    save("gpt2", folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model": Trap(str(trap)), "model_args": {}}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a readable file of tensors and plain data"):
        import_huggingface(folder, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="not a readable file of tensors and plain data"):
        import_nanogpt(folder / "pytorch_model.bin", tmp_path / "ours")
    assert not trap.exists() and not (tmp_path / "ours").exists()
    # It is a trap indeed.
    Trap(str(trap)).__reduce__()[0](*Trap(str(trap)).__reduce__()[1])
    assert trap.exists()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_of_torch_is_read_where_there_are_no_safetensors(tmp_path) -> None:
    theirs = save("gpt2", tmp_path / "theirs")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    # As the first published files: no prefix, and buffers besides the weights.
    weights["h.0.attn.bias"] = torch.ones(1, 1, T, T)
    (tmp_path / "theirs" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "theirs" / "pytorch_model.bin")
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    assert_same_logits(our_model(tmp_path / "ours"), theirs)


def test_low_precision_stays_and_can_be_chosen(tmp_path) -> None:
    theirs = random_model("qwen2-untied").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    ours = ModelFolder(tmp_path / "ours")
    assert ours.config.train.precision == "bf16" and ours.dtype("final_norm.weight") == torch.bfloat16
    export_huggingface(open_source(tmp_path / "ours"), tmp_path / "same")
    export_huggingface(open_source(tmp_path / "ours"), tmp_path / "wide", dtype=torch.float32)
    for name, dtype in (("same", torch.bfloat16), ("wide", torch.float32)):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert again.dtype == dtype
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(again.parameters(), theirs.parameters(), strict=True))


def test_a_window_comes_in_and_goes_out_and_another_architecture_can_be_asked_for(tmp_path, llama) -> None:
    save("mistral-window", tmp_path / "theirs")
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    assert ModelFolder(tmp_path / "ours").config.attention.stride == 7
    with pytest.raises(ConfigError, match="attention.windows is 7; must be one of None"):
        export_huggingface(open_source(tmp_path / "ours"), tmp_path / "out", architecture="LlamaForCausalLM")
    with pytest.raises(ConfigError, match="architecture: 'T5'; must be one of GPT2LMHeadModel"):
        export_huggingface(open_source(tmp_path / "ours"), tmp_path / "out", architecture="T5")
    assert not (tmp_path / "out").exists()
    import_huggingface(llama, tmp_path / "llama")
    with pytest.raises(ConfigError, match="model.qkv_bias is False; must be one of True"):
        export_huggingface(open_source(tmp_path / "llama"), tmp_path / "out", architecture="Qwen2ForCausalLM")
    export_huggingface(open_source(tmp_path / "llama"), tmp_path / "out", architecture="MistralForCausalLM")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.sliding_window is None
    assert_same_logits(again.eval(), AutoModelForCausalLM.from_pretrained(llama).eval())
