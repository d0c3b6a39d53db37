"""Sampling from a run's checkpoints, through the script as a user starts it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from runs import REPOSITORY, command, run, write_corpus

from megasparse.checkpoint.reader import Checkpoint
from megasparse.inference.sampling import sample_text
from megasparse.inference.trained import TrainedModel, open_trained
from megasparse.sparsity.topology import unpack_bits

PROMPT = "12 + "


def sample(trained: TrainedModel, prompt: str, num_tokens: int, **options) -> str:
    return sample_text(trained.model, trained.tokenizer, prompt, num_tokens, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one rank with checkpoints of steps 8 (ultra-sparse), 16 and 24 (dense)."""
    folder = tmp_path_factory.mktemp("trained")
    settings = ["run.name=tiny", "train.save_interval=8", "train.keep_checkpoints=9", f"train.sample_prompt='{PROMPT}'"]
    run(command(write_corpus(folder), folder, *settings, ranks=1))
    return folder / "tiny"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(trained, tmp_path / "tiny")
    return tmp_path / "tiny"


def generate(run_folder: Path, *words: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, str(REPOSITORY / "launch" / "generate.py"), "--run", str(run_folder)]
    done = processes.run(
        [*arguments, "--prompt", PROMPT, "--tokens", "10", "--device", "cpu", *words],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def checkpoint(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step-{step:08d}"


def cut(run_folder: Path, step: int) -> None:
    path = checkpoint(run_folder, step) / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def test_the_newest_checkpoint_gives_the_sample_that_the_run_left(trained: Path) -> None:
    """Same weights, pattern, seed and options: the float32 arithmetic on one thread is the same too."""
    done = generate(trained)
    assert "step 24, attention full" in done.stderr
    left = (trained / "sample.txt").read_text()
    assert left.startswith(PROMPT) and len(left) > len(PROMPT)
    # The script stops where a document ends, the run's sample goes on.
    text = done.stdout.removesuffix("\n")
    assert left.startswith(text) and len(text) > len(PROMPT)
    again = generate(trained, "--num-samples", "2", "--seed", "1234").stdout
    first, second = again.removeprefix("--- seed 1234\n").split("\n--- seed 1235\n")
    assert first == text and second.startswith(PROMPT) and second.removesuffix("\n") != text


def test_sampling_depends_on_step_seed_and_options_alone(trained: Path) -> None:
    newest, early = open_trained(trained), open_trained(trained, step=8)
    assert (newest.step, newest.pattern, early.step, early.pattern) == (24, "full", 8, "sparse")
    assert early.model.layers[0].attention.patterns == ("sparse",) * 4
    options = {"temperature": 1.0, "top_k": None, "top_p": 0.9}
    texts = [sample(newest, PROMPT, 30, seed=seed, **options) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(PROMPT) for text in texts)
    greedy = [sample(newest, PROMPT, 30, seed=seed, temperature=0.0) for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    assert sample(early, PROMPT, 30, seed=1, **options) != texts[0]
    assert len(sample(newest, "", 5, seed=0)) <= 5


def test_weights_of_dead_units_are_zero_so_that_masks_need_not_be_loaded(trained: Path) -> None:
    model = open_trained(trained, step=8).model
    masks = Checkpoint(checkpoint(trained, 8)).topology()
    layers = model.sparse_layers()
    assert layers
    for name, layer in layers.items():
        active = unpack_bits(masks[f"active/{name}"], layer.mask.numel()).view_as(layer.mask)
        weights = active.repeat_interleave(layer.block_size, 0).repeat_interleave(layer.block_size, 1)
        assert 0 < int(active.sum()) < active.numel()
        assert not layer.weight[~weights].any() and layer.weight[weights].all()
        assert layer.weight.dtype == torch.float32


def test_a_damaged_checkpoint_is_passed_over_or_refused(copied: Path) -> None:
    cut(copied, 24)
    done = generate(copied)
    assert "step 16," in done.stderr and "passed over" in done.stderr
    assert "rank-00000.safetensors has 1000 bytes" in done.stderr
    refused = generate(copied, "--step", "24", expect=2)
    assert "rank-00000.safetensors has 1000 bytes" in refused.stderr and refused.stdout == ""
    for step in (8, 16):
        cut(copied, step)
    with pytest.raises(ValueError, match="no good checkpoint: .*has 1000 bytes"):
        open_trained(copied)


def test_what_is_missing_is_named(trained: Path, copied: Path, tmp_path: Path) -> None:
    refused = generate(tmp_path / "nowhere", expect=2)
    assert "no run there" in refused.stderr and refused.stdout == ""
    refused = generate(trained, "--temperature", "nan", expect=2)
    assert "temperature: nan; must be 0 (greedy) or more, and finite" in refused.stderr and refused.stdout == ""
    refused = generate(trained, "--prompt", "a" * 33, expect=2)
    assert "prompt: 33 tokens; must be at most 32, the model's seq_length" in refused.stderr and refused.stdout == ""
    assert f"{2**63}; must be 0 to 2^63 - 1" in generate(trained, "--seed", str(2**63), expect=2).stderr
    with pytest.raises(ValueError, match="no checkpoint of step 9; must be 8, 16, 24"):
        open_trained(trained, step=9)
    with pytest.raises(ValueError, match="temperature: -1"):
        sample(open_trained(trained), PROMPT, 3, seed=0, temperature=-1.0)
    config = copied / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("tokenizer: bytes", "tokenizer: null"))
    with pytest.raises(ValueError, match="data.tokenizer: unset"):
        open_trained(copied)
    config.write_text(text.replace("num_layers: 2", "num_layers: 3"))
    with pytest.raises(ValueError, match="does not fit"):
        open_trained(copied)
    config.write_text(text)
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(ValueError, match="no good checkpoint"):
        open_trained(copied)
