"""What published folders say twice: tokens that begin and end texts, heads of tied models, the length of positions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from random_models import V, our_model, save  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from megasparse.checkpoint.model_folder import ModelFolder  # noqa: E402
from megasparse.conversion.huggingface.exporting import export_huggingface  # noqa: E402
from megasparse.conversion.huggingface.importing import import_huggingface, import_nanogpt  # noqa: E402
from megasparse.conversion.sources import open_source  # noqa: E402
from megasparse.inference.sampling import sample_text  # noqa: E402
from megasparse.inference.trained import open_trained  # noqa: E402

SPECIAL = ["<begin>", "<end>", "<turn end>"]
"""Names of which none is well known; ids 0, 1 and 2."""


def edit(path: Path, **fields: object) -> None:
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, **fields}))


def write_tokenizer(folder: Path) -> None:
    """Letters, a token each, after the special ones."""
    letters = {letter: i for i, letter in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz "])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))


def always(model: torch.nn.Module, token: int) -> torch.nn.Module:
    """The same model, whose likeliest token is `token` everywhere."""
    model.head.weight.data.zero_()
    model.final_norm.weight.data.zero_()
    model.final_norm.bias.data.fill_(1.0)
    model.head.weight.data[token] = 1.0
    return model


@pytest.mark.parametrize("ends", [1, [1, 2]])
@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_the_models_own_end_tokens_end_texts_and_stay(tmp_path, where, ends) -> None:
    theirs = tmp_path / "theirs"
    save("gpt2-exact-untied", theirs)
    write_tokenizer(theirs)
    (theirs / "generation_config.json").unlink()
    edit(theirs / "config.json", bos_token_id=None, eos_token_id=None)
    edit(theirs / where, bos_token_id=0, eos_token_id=ends)
    if where == "generation_config.json":
        edit(theirs / where, temperature=0.7)
    assert import_huggingface(theirs, tmp_path / "ours") == []
    trained = open_trained(tmp_path / "ours")
    own = (1,) if ends == 1 else (1, 2)
    assert (trained.end_tokens, trained.begin_token, trained.tokenizer.end_of_document_id) == (own, 0, 1)
    for token in (1, 2, 5):
        text = sample_text(
            always(trained.model, token), trained.tokenizer, "a", 3, seed=0, temperature=0.0,
            end_tokens=trained.end_tokens,
        )  # fmt: skip
        expected = {1: "a", 2: "a" if 2 in own else "a" + 3 * "<turn end>", 5: "accc"}
        assert text == expected[token]
    export_huggingface(open_source(tmp_path / "ours"), tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == ends
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept.get("temperature") == (0.7 if where == "generation_config.json" else None)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<end>"


def test_what_is_no_end_token_is_refused_and_others_are_passed_over(tmp_path) -> None:
    save("llama2", tmp_path / "theirs")
    edit(tmp_path / "theirs" / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id: '</s>'; must be a token id, a list"):
        import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    write_tokenizer(tmp_path / "theirs")
    edit(tmp_path / "theirs" / "tokenizer_config.json", eos_token="<end>")
    edit(tmp_path / "theirs" / "generation_config.json", eos_token_id=[50256, V], bos_token_id=50256)
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    trained = open_trained(tmp_path / "ours")
    assert trained.end_tokens == (1,) and trained.begin_token == 1
    export_huggingface(open_source(tmp_path / "ours"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize(
    ("settings", "begin"),
    [
        ({"bos_token": "<begin>", "eos_token": "<end>"}, 0),
        ({"bos_token": {"content": "<turn end>", "special": True}}, 2),
        ({"bos_token": None, "eos_token": "<turn end>"}, 2),
        ({"eos_token": "<end>"}, 3),
    ],
)
def test_texts_begin_with_the_tokenizers_begin_token_or_else_its_end(tmp_path, settings, begin) -> None:
    save("llama2", tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs")
    edit(tmp_path / "theirs" / "tokenizer_config.json", **settings)
    edit(tmp_path / "theirs" / "generation_config.json", bos_token_id=3, eos_token_id=1)
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    assert open_trained(tmp_path / "ours").begin_token == begin


@pytest.mark.parametrize(
    ("settings", "adds", "leading"), [({}, True, (0,)), ({}, False, ()), ({"add_bos_token": False}, True, ())]
)
def test_what_transformers_puts_before_every_text_is_known(tmp_path, settings, adds, leading) -> None:
    """The adapter of lm-evaluation-harness begins texts with it, as the harness's own model does."""
    save("llama2", tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs")
    path = tmp_path / "theirs" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    if adds:
        template = tokenizers.processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 0)])
        tokenizer.post_processor = tokenizers.processors.Sequence([template])
    tokenizer.save(str(path))
    edit(tmp_path / "theirs" / "tokenizer_config.json", bos_token="<begin>", eos_token="<end>", **settings)
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    assert open_trained(tmp_path / "ours").leading_tokens == leading


@pytest.mark.parametrize("case", ["gpt2", "qwen2", "llama-tied-biases"])
@pytest.mark.parametrize("change", [None, 0.0, 1.0])
def test_a_tied_models_own_head_is_computed_with(tmp_path, case, change) -> None:
    """Added to the table of the tokens in the file: nothing, the same values, others."""
    folder = tmp_path / "theirs"
    save(case, folder)
    tensors = load_file(folder / "model.safetensors")
    table = tensors["transformer.wte.weight" if case == "gpt2" else "model.embed_tokens.weight"]
    if change is not None:
        tensors["lm_head.weight"] = table + change * torch.arange(V).unsqueeze(1) / V
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    notes = import_huggingface(folder, tmp_path / "ours")
    assert any("imported untied" in note for note in notes) == bool(change)
    assert ModelFolder(tmp_path / "ours").config.model.tie_embeddings == (not change)
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = (
            AutoModelForCausalLM.from_pretrained(folder)(tokens).logits,
            our_model(tmp_path / "ours")(tokens),
        )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_head_of_its_own_in_a_checkpoint_of_nanogpt(tmp_path, change) -> None:
    model = save("gpt2", tmp_path / "theirs")
    tensors = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name in tensors:
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensors[name] = tensors[name].t().contiguous()
    tensors["lm_head.weight"] += change
    arguments = {"n_layer": 2, "n_embd": 48, "n_head": 4, "block_size": 40, "vocab_size": V, "bias": True}
    torch.save({"model": tensors, "model_args": arguments}, tmp_path / "ckpt.pt")
    notes = import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "ours")
    assert any("imported untied" in note for note in notes) == bool(change)
    assert ModelFolder(tmp_path / "ours").config.model.tie_embeddings == (not change)


def test_an_exported_gpt2_says_its_length_by_both_names(tmp_path) -> None:
    save("gpt2", tmp_path / "theirs")
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    export_huggingface(open_source(tmp_path / "ours"), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["n_ctx"] == values["n_positions"] == 40
