"""A run's checkpoints as model folders and as folders of transformers, and a run that starts from one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from runs import REPOSITORY, command, metrics, run, write_corpus
from safetensors.torch import load_file

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.checkpoint.reader import Checkpoint
from megasparse.conversion.huggingface.exporting import export_huggingface
from megasparse.conversion.sources import open_source, write_source
from megasparse.inference.generation import generate
from megasparse.inference.sampling import sample_text
from megasparse.inference.trained import open_trained
from megasparse.sparsity.topology import unpack_bits

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TOOL = [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py")]
GENERATE = [sys.executable, str(REPOSITORY / "launch" / "generate.py"), "--tokens", "10", "--device", "cpu"]
PROMPT = "12 + "


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(prefix, tmp_path_factory) -> Path:
    """A finished run of one rank with checkpoints of steps 8 (ultra-sparse), 16 and 24 (dense); 257 entries."""
    folder = tmp_path_factory.mktemp("finished")
    settings = ["run.name=tiny", "train.save_interval=8", "train.keep_checkpoints=9"]
    run(command(prefix, folder, *settings, ranks=1))
    return folder / "tiny"


def test_a_run_goes_to_transformers_and_says_the_same(finished, tmp_path) -> None:
    assert export_huggingface(open_source(finished), tmp_path / "out") == []
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.vocab_size == 257 and theirs.generation_config.eos_token_id == 256
    trained = open_trained(finished)
    prompt = torch.tensor([trained.tokenizer.encode(PROMPT)])
    ours = generate(trained.model, prompt, 20, temperature=0.0)
    assert torch.equal(theirs.generate(prompt, do_sample=False, max_new_tokens=20, eos_token_id=None), ours)
    card = (tmp_path / "out" / "README.md").read_text()
    loss = metrics(finished)[-1]["loss"]
    for row in ("optimizer steps done | 24", f"training loss | {loss:.4f}", "sparsity algorithm | mst"):
        assert f"| {row} |" in card
    assert "Note:" not in card


def test_an_ultra_sparse_checkpoint_keeps_its_zeros_and_its_topology(finished, tmp_path) -> None:
    (note,) = export_huggingface(open_source(finished, step=8), tmp_path / "out")
    assert "trained last under the attention pattern sparse of stride 8; transformers computes full" in note
    assert f"Note: {note}" in (tmp_path / "out" / "README.md").read_text()
    write_source(open_source(finished, step=8), tmp_path / "model")
    folder = ModelFolder(tmp_path / "model")
    folder.check_files()
    saved = Checkpoint(finished / "checkpoints" / "step-00000008").topology()
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert folder.facts["step"] == 8 and folder.facts["algorithm"] == "mst"
    assert all(torch.equal(bits, saved[key]) for key, bits in folder.topology().items())
    active = unpack_bits(saved["active/layers.0.mlp.up"], 64).view(16, 4)
    inactive = ~active.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert inactive.float().mean() > 0.5
    for weight in (folder.tensor("layers.0.mlp.up.weight"), exported["transformer.h.0.mlp.c_fc.weight"].t()):
        assert not weight[inactive].any() and weight[~inactive].all()
    trained = open_trained(tmp_path / "model")
    assert (trained.step, trained.pattern) == (8, "sparse")


def test_a_model_folder_samples_as_its_run_does_and_a_run_starts_from_it(finished, prefix, tmp_path) -> None:
    model = tmp_path / "model"
    run([*TOOL, "from-run", "--input", str(finished), "--output", str(model)])
    text = run([*GENERATE, "--run", str(model), "--prompt", PROMPT]).stdout
    trained = open_trained(finished)
    assert sample_text(trained.model, trained.tokenizer, PROMPT, 10, seed=trained.config.run.seed) in text

    settings = [f"train.init_from={model}", "sparsity.algorithm=dense", "train.steps=4"]
    printed = run(command(prefix, tmp_path, "run.name=next", *settings, "parallel.tensor_parallel_size=2")).stdout
    assert f"starting from the weights of {model}" in printed
    first, last = metrics(tmp_path / "next")[0], metrics(finished)[-1]
    assert first["step"] == 1 and first["loss"] == pytest.approx(last["loss"], rel=0.15)
    assert metrics(finished)[0]["loss"] > 1.5 * first["loss"]
