"""The whole road of a dense checkpoint of transformers: in, pruned, fine-tuned while sparse on two ranks, and out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from runs import FREE_PORT, REPOSITORY, metrics, run, write_corpus

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from megasparse.checkpoint.model_folder import ModelFolder  # noqa: E402
from megasparse.conversion.huggingface.exporting import export_huggingface  # noqa: E402
from megasparse.conversion.huggingface.importing import import_huggingface  # noqa: E402
from megasparse.conversion.sources import open_source  # noqa: E402
from megasparse.inference.generation import generate  # noqa: E402
from megasparse.inference.trained import open_trained  # noqa: E402
from megasparse.launching import LaunchEnvironment  # noqa: E402
from megasparse.pruning.run import prune  # noqa: E402
from megasparse.pruning.settings import PruneSettings  # noqa: E402
from megasparse.quantization.run import quantize  # noqa: E402
from megasparse.quantization.settings import QuantizeSettings  # noqa: E402

V, STEPS = 257, 50
"""257 entries: bytes, and the end of a document."""
FINETUNE = [
    f"train.steps={STEPS}",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.precision=fp32",
    "train.log_interval=1",
    f"train.valid_interval={STEPS}",
    "train.valid_samples=4",
    "train.trackers=[]",
    "optimizer.lr=1e-2",
    "optimizer.warmup_steps=5",
    "data.tokenizer=bytes",
    "deepspeed.zero_stage=2",
    "kernels.tune=never",
    "run.name=student",
]


def theirs(folder: Path) -> LlamaForCausalLM:
    """A random Llama with grouped heads, which is saved as transformers does it."""
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.12)
    model.save_pretrained(folder)
    return model


def opened(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def matrices(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights of all linear layers of all blocks."""
    return {name: weight for name, weight in model.named_parameters() if "layers." in name and weight.dim() == 2}


def zeros(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in weights.items()}


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    """dense/, half/ (pruned), student/ (the run), exported/; text.txt."""
    folder = tmp_path_factory.mktemp("road")
    corpus = write_corpus(folder, 12)
    theirs(folder / "llama")
    import_huggingface(folder / "llama", folder / "dense")
    settings = PruneSettings(
        folder / "dense", folder / "half", density=0.5, calibration=str(corpus), samples=16, window=32
    )
    prune(settings, LaunchEnvironment.from_variables({}))
    words = ["--model", folder / "half", "--data", corpus, "--teacher", folder / "dense", f"run.folder={folder}"]
    ranks = [str(Path(__file__).with_name("ranks.py")), "2", FREE_PORT]
    run([sys.executable, *ranks, str(REPOSITORY / "launch" / "finetune.py"), *map(str, words), *FINETUNE])
    export_huggingface(open_source(folder / "student"), folder / "exported")
    return folder


def test_the_student_learns_from_its_teacher(road) -> None:
    lines = metrics(road / "student")
    assert lines[-1]["step"] == STEPS and {round(line["density"], 4) for line in lines} == {0.5}
    first, last = (sum(line["square_head"] for line in part) for part in (lines[:5], lines[-5:]))
    assert last < 0.9 * first, (first, last)


def test_zeros_are_those_that_pruning_has_made(road, tmp_path) -> None:
    export_huggingface(open_source(road / "half"), tmp_path / "half")
    pruned, tuned = (matrices(opened(path)) for path in (tmp_path / "half", road / "exported"))
    places = zeros(pruned)
    assert all(torch.equal(places[name], found) for name, found in zeros(tuned).items())
    assert 2 * sum(int(found.sum()) for found in places.values()) == sum(w.numel() for w in pruned.values())
    assert all((tuned[name] != pruned[name])[~places[name]].float().mean() > 0.9 for name in pruned)


def test_transformers_computes_what_ours_does(road) -> None:
    ours, exported = open_trained(road / "student").model, opened(road / "exported")
    tokens = torch.randint(V, (2, 24))
    with torch.no_grad():
        # Sums of 32 to 64 products in float32, through two blocks, in another order.
        torch.testing.assert_close(ours(tokens)[..., :V], exported(tokens).logits, rtol=1e-4, atol=1e-4)
    greedy = exported.generate(tokens[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=256)
    assert torch.equal(generate(ours, tokens[:1], 8, temperature=0, num_ids=V), greedy)


def test_the_student_is_quantised_and_keeps_its_zeros(road, tmp_path) -> None:
    import_huggingface(road / "exported", tmp_path / "again")
    quantize(QuantizeSettings(tmp_path / "again", tmp_path / "int8"))
    before, after = ModelFolder(tmp_path / "again"), ModelFolder(tmp_path / "int8")
    for name in after.quantization.parameters:
        assert not after.tensor(name)[before.tensor(name) == 0].any()
    export_huggingface(open_source(tmp_path / "int8"), tmp_path / "exported")
    found = matrices(opened(tmp_path / "exported"))
    for name, places in zeros(matrices(opened(road / "exported"))).items():
        assert not found[name][places].any()
