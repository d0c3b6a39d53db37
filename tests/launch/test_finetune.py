"""launch/finetune.py as users call it: a sparse model with a teacher on two ranks, SPDF, a resume, what is refused."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from runs import FREE_PORT, REPOSITORY, command, curve, metrics, run, write_corpus

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.config.loader import load_config
from megasparse.data import IndexedDatasetWriter
from megasparse.inference.trained import open_trained
from megasparse.sparsity.schedule import PatternSchedule, pattern_at
from megasparse.sparsity.topology import unpack_bits
from megasparse.training.finetuning import finetune_words

ENTRY = str(REPOSITORY / "launch" / "finetune.py")
RANKS = str(Path(__file__).with_name("ranks.py"))
TOOLS = REPOSITORY / "tools"
SHORT = [
    "train.steps=12",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.precision=fp32",
    "train.log_interval=1",
    "train.valid_interval=4",
    "train.trackers=[]",
    "optimizer.lr=2e-3",
    "optimizer.warmup_steps=2",
    "data.valid_fraction=0.2",
    "kernels.tune=never",
]


def finetune(folder: Path, *words: str | Path, ranks: int = 1) -> list[str]:
    given = [ENTRY, *map(str, words), f"run.folder={folder}", *SHORT]
    return [sys.executable, *([] if ranks == 1 else [RANKS, str(ranks), FREE_PORT]), *given]


def tool(name: str, *words: str | Path) -> None:
    run([sys.executable, str(TOOLS / f"{name}.py"), *map(str, words)])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model that was pretrained with static masks, as a folder; a dense one; sums as prompts and responses."""
    folder = tmp_path_factory.mktemp("made")
    corpus = write_corpus(folder)
    chance = random.Random(1)
    for name, algorithm in (("sparse", "static"), ("dense", "dense")):
        settings = [f"run.name={name}", f"sparsity.algorithm={algorithm}", "sparsity.density=0.5"]
        run(command(corpus, folder, *settings, ranks=1))
        tool("convert_checkpoint", "from-run", "--input", folder / name, "--output", folder / f"{name}-model")
    sums = [chance.choices(range(100), k=2) for _ in range(300)]
    lines = [json.dumps({"prompt": f"{a} + {b} =", "response": f" {a + b}\n"}) for a, b in sums]
    (folder / "sums.jsonl").write_text("\n".join(lines))
    data = ("--tokenizer", "bytes", "--output-prefix", folder / "sums", "--max-tokens", "33")
    tool("preprocess_data", "--supervised", "--input", folder / "sums.jsonl", *data)
    return folder


def masked_weights(folder: Path) -> dict[str, torch.Tensor]:
    """For each sparse layer of a model folder its mask, expanded to the weights."""
    source, side = ModelFolder(folder), 16
    masks = {}
    for key, bits in source.topology().items():
        if key.startswith("active/"):
            name = f"{key.removeprefix('active/')}.weight"
            rows, columns = (size // side for size in source.shape(name))
            grid = unpack_bits(bits, rows * columns).view(rows, columns)
            masks[name] = grid.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return masks


@pytest.fixture(scope="module")
def student(made) -> Path:
    """Fine-tuned on two ranks under a teacher, straight through."""
    words = ("--model", made / "sparse-model", "--data", made / "sums", "--teacher", made / "dense-model")
    run(finetune(made, *words, "run.name=student", "deepspeed.zero_stage=2", ranks=2))
    return made / "student"


def test_a_sparse_model_learns_the_task_and_keeps_its_zeros(made, student, tmp_path) -> None:
    lines = metrics(student)
    assert lines[-1]["val_loss"] < lines[3]["val_loss"] and lines[-1]["square_head"] < lines[0]["square_head"]
    assert {round(line["density"], 3) for line in lines} == {0.5} and lines[-1]["step"] == 12
    config = load_config([student / "config.yaml"])
    assert (config.optimizer.schedule, config.sparsity.lr_density_power) == ("linear", 0.0)
    tool("convert_checkpoint", "from-run", "--input", student, "--output", tmp_path / "out")
    before, after = ModelFolder(made / "sparse-model"), ModelFolder(tmp_path / "out")
    for name, mask in masked_weights(made / "sparse-model").items():
        assert 0.4 < float(mask.float().mean()) < 0.6
        assert not after.tensor(name)[~mask].any(), f"{name}: a zero has moved"
        assert (after.tensor(name) != before.tensor(name))[mask].float().mean() > 0.5
    assert all(torch.equal(before.topology()[key], bits) for key, bits in after.topology().items() if "active" in key)


def test_it_goes_on_where_it_was_stopped(made, student, tmp_path) -> None:
    words = ("--model", made / "sparse-model", "--data", made / "sums", "--teacher", made / "dense-model")
    words = (*words, "run.name=student", "deepspeed.zero_stage=2")
    run(finetune(tmp_path, *words, "train.stop_after=5", ranks=2))
    resumed = run(finetune(tmp_path, *words, "train.resume=auto", ranks=2))
    assert "going on from step 5" in resumed.stdout
    assert curve(tmp_path / "student") == curve(student)


def test_attention_stays_what_the_model_was_trained_under(made) -> None:
    """Beyond the stride it is another model without its pattern."""
    recipe = REPOSITORY / "configs" / "finetune" / "default.yaml"
    for name, pattern in (("sparse", "sparse"), ("dense", "full")):
        folder = ModelFolder(made / f"{name}-model")
        config = load_config([recipe], finetune_words(folder.folder, dense=True))
        schedule = PatternSchedule(config.attention, config.model.num_layers, config.model.num_attention_heads)
        for step in (1, config.train.steps // 2, config.train.steps):
            assert pattern_at(config, step, schedule) == pattern
        for field in ("stride", "stride_offsets", "overrides") if pattern != "full" else ():
            assert getattr(config.attention, field) == getattr(folder.config.attention, field)


def test_spdf_begins_as_the_sparse_model_and_trains_all_weights(made, tmp_path) -> None:
    """Thangarasa et al. 2023: the function is the same right after densification; then masked weights move too."""
    words = ("--model", made / "sparse-model", "--data", made / "sums", "--dense", "run.name=spdf")
    output = run(finetune(tmp_path, *words)).stdout
    assert "all weights are active at the start, zeros too" in output.replace("\n", " ")
    lines = metrics(tmp_path / "spdf")
    assert lines[-1]["val_loss"] < lines[3]["val_loss"] and {line["density"] for line in lines} == {1.0}
    # What is left to save is attention, which stays sparse.
    assert all(0.9 * line["flops_dense"] < line["flops_algorithmic"] < line["flops_dense"] for line in lines)
    # A static run on the same data: its first loss is of the same weights, before any step.
    static = ("--model", made / "sparse-model", "--data", made / "sums", "run.name=static", "train.stop_after=1")
    run(finetune(tmp_path, *static))
    assert metrics(tmp_path / "static")[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)
    trained = dict(open_trained(tmp_path / "spdf").model.named_parameters())
    for name, mask in masked_weights(made / "sparse-model").items():
        moved = (trained[name][~mask] != 0).float().mean()
        assert moved > 0.5, f"{name}: {float(moved):.2f} of the weights that were masked have moved"


def test_what_does_not_fit_is_refused_before_a_start(made, tmp_path) -> None:
    model, data = ("--model", made / "sparse-model"), ("--data", made / "sums")
    with IndexedDatasetWriter(made / "long", "uint16", loss_mask=True) as writer:
        for length in (30, 40, 30):
            writer.add_document([65] * length, [0] * 20 + [1] * (length - 20))
    cases = {
        (*model, *data, "--teacher", tmp_path): "distillation.teacher",
        ("--model", tmp_path, *data): "--model",
        (*model, "--data", made / "long"): "model.seq_length: 32 holds 33 tokens of an example",
        (*model, *data, "sparsity.density=0.2"): "has a topology of density 0.5",
    }
    for words, message in cases.items():
        result = run(finetune(tmp_path, *words), expect=2)
        assert message in result.stdout and "Traceback" not in result.stdout, result.stdout
    assert not list(tmp_path.iterdir())


def test_settings_can_be_seen_and_overridden(made, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("optimizer: {lr: 0.125, beta2: 0.5}\n")
    words = ("--model", made / "sparse-model", "--data", made / "sums", "--config", tmp_path / "mine.yaml")
    shown = run([sys.executable, ENTRY, *map(str, words), "--print-config", "optimizer.lr=0.25"]).stdout
    (tmp_path / "shown.yaml").write_text(shown)
    config = load_config([tmp_path / "shown.yaml"])
    assert (config.optimizer.lr, config.optimizer.beta2, config.optimizer.schedule) == (0.25, 0.5, "linear")
    assert config.model.hidden_size == 64 and config.sparsity.algorithm == "static" and config.data.document_masking


def test_a_short_run_warms_up_over_half_of_its_steps(made, tmp_path) -> None:
    """Unless the user says otherwise, by word or by file; what cannot be is refused then."""
    words = ("--model", made / "dense-model", "--data", made / "sums", "data.valid_fraction=0.2")
    start = [sys.executable, ENTRY, *map(str, words)]
    (tmp_path / "mine.yaml").write_text("optimizer: {warmup_steps: 20}\n")
    for steps, given, expected in ((12, [], 6), (12, ["optimizer.warmup_steps=3"], 3), (30, [], 15), (40, [], 20),
                                   (30, ["--config", str(tmp_path / "mine.yaml")], 20)):  # fmt: skip
        output = run([*start, f"train.steps={steps}", *given, "--print-config"]).stdout
        assert f"  warmup_steps: {expected}\n" in output
        told = f"optimizer.warmup_steps: {expected}, half of train.steps {steps}, in place of the 20 of default.yaml"
        assert (told in output) == (not given and steps < 40)
    assert "Traceback" not in run([*start, "train.steps=12", "--dry-run"]).stdout
    refused = run([*start, "train.steps=12", "optimizer.warmup_steps=20", "--dry-run"], expect=2)
    assert "optimizer.warmup_steps: 20 exceeds train.steps 12" in refused.stdout


def test_data_without_a_mask_can_be_fine_tuned_on_too(made, tmp_path) -> None:
    with IndexedDatasetWriter(tmp_path / "plain", "uint16") as writer:
        writer.add_document([*range(32, 120)] * 20)
    words = ("--model", made / "dense-model", "--data", tmp_path / "plain", "run.name=plain", "train.stop_after=2")
    run(finetune(tmp_path, *words))
    assert metrics(tmp_path / "plain")[-1]["step"] == 2


def test_few_blocks_are_tuned_and_merged(made, tmp_path) -> None:
    """Sparse Matrix Tuning from command to merged model, which is opened like any other."""
    words = ("--model", made / "dense-model", "--data", made / "sums", "run.name=tuned", "smt.density=0.2")
    given = [*map(str, words), "smt.block_size=16", "smt.warmup_steps=4"]
    run(finetune(tmp_path, *given))
    plan = json.loads((tmp_path / "tuned" / "plan.json").read_text())
    assert plan["methods"][0].startswith("Sparse Matrix Tuning: 4 steps with all of ")
    lines = metrics(tmp_path / "tuned")
    assert [line["smt_warmup"] for line in lines] == [1] * 4 + [0] * 8
    adapter, base = tmp_path / "tuned" / "adapter.safetensors", made / "dense-model"
    assert adapter.stat().st_size < 0.5 * (base / "model.safetensors").stat().st_size
    tool("merge_adapter", "--model", base, "--adapter", adapter, "--output", tmp_path / "merged")
    before, after = (dict(open_trained(folder).model.named_parameters()) for folder in (base, tmp_path / "merged"))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed and all(".attention." in name or ".mlp." in name for name in changed)
