"""Checkpoints of nanoGPT, tokenizers that go along, DeepSpeed's universal form, and the tool's command line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import processes
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from random_models import T, V, our_model, random_model, save  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from megasparse.checkpoint.model_folder import ModelFolder  # noqa: E402
from megasparse.checkpoint.store import CheckpointError  # noqa: E402
from megasparse.conversion.huggingface.exporting import export_huggingface  # noqa: E402
from megasparse.conversion.huggingface.importing import import_huggingface, import_nanogpt  # noqa: E402
from megasparse.conversion.sources import UniversalSource, open_source, write_source  # noqa: E402
from megasparse.inference.sampling import sample_text  # noqa: E402
from megasparse.inference.trained import open_trained  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEXT = "A model folder goes to and fro.\n\n  It keeps its words."


def nanogpt_checkpoint(path: Path, *, bias: bool = True, prefix: str = "_orig_mod.") -> torch.nn.Module:
    """A checkpoint as nanoGPT's train.py writes it, and the same model of transformers (whose linear layers are
    transposed)."""
    theirs = random_model("gpt2")
    theirs.config.activation_function = "gelu"
    reference = type(theirs)(theirs.config).eval()
    weights = dict(theirs.state_dict())
    if not bias:
        weights = {name: 0 * tensor if name.endswith(".bias") else tensor for name, tensor in weights.items()}
    reference.load_state_dict(weights)
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = {
        prefix + name: tensor.t().contiguous() if name.endswith(transposed) else tensor
        for name, tensor in weights.items()
        if bias or not name.endswith(".bias")
    }
    torch.save(
        {
            "model": tensors,
            "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
            "model_args": {
                "n_layer": 2, "n_head": 4, "n_embd": 48, "block_size": T, "bias": bias, "vocab_size": V, "dropout": 0.0,
            },
            "iter_num": 2000,
            "best_val_loss": torch.tensor(1.5),
            "config": {"out_dir": "out"},
        },
        path,
    )  # fmt: skip
    return reference


@pytest.mark.parametrize(("bias", "prefix"), [(True, "_orig_mod."), (False, "")])
def test_nanogpt_comes_in_and_goes_on_to_transformers(tmp_path, bias, prefix) -> None:
    reference = nanogpt_checkpoint(tmp_path / "ckpt.pt", bias=bias, prefix=prefix)
    notes = import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "ours")
    assert "set data.tokenizer" in notes[0]
    folder = ModelFolder(tmp_path / "ours")
    assert folder.facts == {"architecture": "nanoGPT", "step": 2000} and folder.config.model.bias == bias
    export_huggingface(open_source(tmp_path / "ours"), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.activation_function == "gelu"
    tokens = torch.randint(V, (2, T))
    with torch.no_grad():
        expected = reference(tokens).logits
        for logits in (our_model(tmp_path / "ours")(tokens), again(tokens).logits):
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "tanh", activation="gelu")
    with torch.no_grad():
        assert not torch.allclose(our_model(tmp_path / "tanh")(tokens), expected, atol=1e-5)


def test_what_is_no_nanogpt_checkpoint_is_refused(tmp_path) -> None:
    path = tmp_path / "ckpt.pt"
    for content, reason in (
        ({"weights": {}}, "no checkpoint of nanoGPT"),
        ({"model": {}, "model_args": {"n_layer": 1}}, "model_args lacks block_size, n_embd"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=reason):
            import_nanogpt(path, tmp_path / "ours")
    path.write_bytes(b"no file of torch")
    with pytest.raises(CheckpointError, match="not a readable file of tensors"):
        import_nanogpt(path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer.json as GPT-2's, small."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def wide_gpt2(folder: Path, vocab_size: int) -> torch.nn.Module:
    import transformers

    config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=T, n_embd=48, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_tokenizer_json_goes_along_and_samples(tmp_path) -> None:
    wide_gpt2(tmp_path / "theirs", 310)
    write_tokenizer(tmp_path / "theirs")
    assert import_huggingface(tmp_path / "theirs", tmp_path / "ours") == []
    trained = open_trained(tmp_path / "ours")
    assert trained.pattern == "full" and trained.tokenizer.decode(trained.tokenizer.encode(TEXT)) == TEXT
    assert sample_text(trained.model, trained.tokenizer, "A", 5, seed=0).startswith("A")
    with pytest.raises(ValueError, match="step: 3; must be unset: .* is a model folder"):
        open_trained(tmp_path / "ours", step=3)
    export_huggingface(open_source(tmp_path / "ours"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT)["input_ids"] == trained.tokenizer.encode(TEXT)
    assert tokenizer.eos_token == "<|endoftext|>"


def test_a_sentencepiece_model_goes_along(tmp_path, shared_data) -> None:
    model = shared_data / "sentencepiece" / "sp-test-1k.model"
    if not model.is_file():
        pytest.skip("there is no sentencepiece model in ../shared/data")
    wide_gpt2(tmp_path / "theirs", 1001)
    (tmp_path / "theirs" / "tokenizer.model").write_bytes(model.read_bytes())
    assert import_huggingface(tmp_path / "theirs", tmp_path / "ours") == []
    assert open_trained(tmp_path / "ours").tokenizer.vocab_size <= 1001
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == model.read_bytes()
    # transformers would give other ids for it: tests/conversion/test_exported_tokenizers.py.
    (note,) = export_huggingface(open_source(tmp_path / "ours"), tmp_path / "out")
    assert "no tokenizer is written" in note and not (tmp_path / "out" / "tokenizer.model").exists()


def test_a_tokenizer_that_cannot_be_used_is_said(tmp_path) -> None:
    wide_gpt2(tmp_path / "theirs", 97)
    (note,) = import_huggingface(tmp_path / "theirs", tmp_path / "none")
    assert "there is no tokenizer.json or tokenizer.model" in note
    with pytest.raises(ValueError, match="data.tokenizer: unset"):
        open_trained(tmp_path / "none")
    write_tokenizer(tmp_path / "theirs")
    (note,) = import_huggingface(tmp_path / "theirs", tmp_path / "small")
    assert "entries, the model 97" in note and (tmp_path / "small" / "tokenizer.json").exists()


def test_deepspeeds_universal_form_comes_in(tmp_path) -> None:
    save("llama2", tmp_path / "theirs")
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    ours = ModelFolder(tmp_path / "ours")
    for name in ours.names:
        folder = tmp_path / "universal" / "zero" / name
        folder.mkdir(parents=True)
        weight = ours.tensor(name)
        if name in ("embedding.tokens.weight", "head.weight"):
            weight = torch.cat((weight, torch.ones(31, 48)))
        torch.save({"param": weight, "cat_dim": 0}, folder / "fp32.pt")
    write_source(UniversalSource(tmp_path / "universal", ours.config), tmp_path / "again")
    again = ModelFolder(tmp_path / "again")
    assert all(torch.equal(again.tensor(name), ours.tensor(name)) for name in ours.names)
    torch.save({"param": torch.ones(3)}, tmp_path / "universal" / "zero" / "final_norm.weight" / "fp32.pt")
    with pytest.raises(CheckpointError, match=r"has shape \[3\], the configuration asks for \[48\]"):
        write_source(UniversalSource(tmp_path / "universal", ours.config), tmp_path / "third")
    (tmp_path / "universal" / "zero" / "more").mkdir()
    with pytest.raises(CheckpointError, match="parameters and configuration differ at more"):
        UniversalSource(tmp_path / "universal", ours.config)
    assert not (tmp_path / "third").exists()


def tool(*words: object, expect: int = 0) -> str:
    done = processes.run(
        [sys.executable, ROOT / "tools" / "convert_checkpoint.py", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_the_tool(tmp_path) -> None:
    save("qwen2", tmp_path / "theirs")
    printed = tool("from-huggingface", "--input", tmp_path / "theirs", "--output", tmp_path / "ours")
    assert "note: there is no tokenizer.json" in printed and f"{tmp_path / 'ours'}: written" in printed
    words = ["--input", tmp_path / "ours", "--output", tmp_path / "out"]
    tool("to-huggingface", *words, "--dtype", "bfloat16", "--max-shard-size", "50KB")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    refused = tool("to-huggingface", *words, expect=2)
    assert "convert_checkpoint: error: " in refused and "holds something already" in refused
    universal = ["--input", tmp_path, "--config", tmp_path / "ours" / "config.yaml", "--output", tmp_path / "x"]
    assert "has no folder zero; must be" in tool("from-universal", *universal, expect=2)
    assert not (tmp_path / "x").exists()
