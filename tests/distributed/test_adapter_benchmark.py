"""benchmarks/adapters.py: its arms train as much as each other, and go through; LoRA where peft is installed."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import processes
import pytest
import torch
from engine_runs import run_config

from megasparse.checkpoint.model_folder import ModelFolder, ModelFolderWriter, load_weights
from megasparse.config.loader import load_config
from megasparse.models.build import build_model
from megasparse.parallel import CommunicationGroup
from megasparse.training.plan import plan_run

NEEDS_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed (extra `peft`)")
WIDTHS = [
    *("model.hidden_size=64", "model.ffn_hidden_size=128", "model.vocab_size=257"),
    *("model.tie_embeddings=false", "sparsity.algorithm=dense"),
]
RANK, VOCABULARY = 2, 257


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "model"
    torch.manual_seed(0)
    config = run_config(WIDTHS)
    weights = dict(build_model(config, VOCABULARY).named_parameters())
    with ModelFolderWriter(path, config, dict.fromkeys(weights, torch.float32)) as writer:
        for name in writer.names:
            # Without the rows that pad the vocabulary.
            values = weights[name].detach()[: writer.specs[name].shape[0]]
            writer.write(name, values + 0.01 * torch.randn(values.shape))
    return path


@pytest.fixture
def benchmark(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return importlib.import_module("adapters")


def words(folder: Path, data: Path, *more: str) -> list[str]:
    start = ["--work", folder.parent / "work", "--model", folder, "--data", data, "--valid", data]
    sizes = ["--rank", RANK, "--steps", "10", "--batch", "2", "--threads", "1", "--rates", "1e-3"]
    return [str(word) for word in (*start, *sizes, "--results", folder.parent / "results", *more)]


def test_arms_train_as_many_parameters_as_lora(benchmark, folder, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["adapters.py", *words(folder, folder.parent / "data")])
    arguments, weights = benchmark.parse_arguments(), ModelFolder(folder)
    matrices = [n for n in weights.names if (".attention." in n or ".mlp." in n) and weights.tensor(n).dim() == 2]
    wanted = sum(RANK * sum(weights.tensor(name).shape) for name in matrices)
    # A block of 16 more or less in each of two pools; rounding in each matrix.
    for arm, slack in (("smt", 2 * 16**2), ("spiel", len(matrices)), ("spiel-ma", len(matrices))):
        config = load_config([benchmark.RECIPE], benchmark.words_of(arguments, arm, 1e-3, 1))
        assert abs(plan_run(config, VOCABULARY, 1, "cpu")["parameters"]["total"] - wanted) <= slack, arm
    config = load_config([benchmark.RECIPE], benchmark.words_of(arguments, "full", 1e-3, 1))
    assert plan_run(config, VOCABULARY, 1, "cpu")["parameters"]["total"] > 10 * wanted


def test_the_table_compares_runs_of_the_same_seed(benchmark) -> None:
    def row(arm, seed, loss, rate=1e-3):
        sizes = {"trained": 10, "optimizer_bytes": 80, "peak_bytes": 90, "seconds": 1.0, "accuracy": None}
        return {"arm": arm, "rate": rate, "seed": seed, "validation_loss": loss, **sizes}

    rows = [row("lora", 1, 2.0), row("lora", 2, 3.0), row("smt", 2, 2.9), row("smt", 1, 1.7), row("full", 1, math.nan)]
    lines = benchmark.table(rows, ("full", "lora", "smt")).splitlines()
    assert "loss minus lora" in lines[0] and "not finite" in lines[2]
    # -0.3 and -0.1: mean -0.2, standard error 0.1, and t of one degree of freedom is 12.706.
    assert "-0.2000 (-1.4706 to +1.0706)" in lines[4] and "2.3000 ± 0.8485" in lines[4]
    assert (
        benchmark.best_rate([row("smt", 0, 2.0, 3e-3), row("smt", 0, math.nan, 1e-3), row("smt", 0, 1.9, 1e-2)]) == 1e-2
    )


@NEEDS_PEFT
def test_lora_begins_at_the_model_and_trains_nothing_else(benchmark, folder) -> None:
    source = ModelFolder(folder)
    plain, model = build_model(source.config, VOCABULARY), build_model(source.config, VOCABULARY)
    load_weights(plain, source)
    wanted = benchmark.low_rank_parameters(plain, RANK)
    method = benchmark.lora_method(folder, RANK)(source.config, model, CommunicationGroup())
    assert method is not None
    method.start(contextlib.nullcontext)
    tokens = torch.randint(VOCABULARY, (2, 8))
    torch.testing.assert_close(model(tokens), plain(tokens))
    assert sum(parameter.numel() for parameter in model.parameters()) == wanted
    model(tokens).square().sum().backward()
    # A has no gradient while B is 0.
    assert all(p.grad is not None and bool(p.grad.any()) == ("lora_B" in n) for n, p in model.named_parameters())


@NEEDS_PEFT
def test_an_arm_goes_through_and_is_taken_up_again(repository, folder) -> None:
    lines = [json.dumps({"prompt": f"{n} plus {n} is", "response": f" {2 * n}"}) for n in range(40)]
    (folder.parent / "tasks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = folder.parent / "tasks"
    encode = ["--supervised", "--tokenizer", "bytes", "--input", f"{data}.jsonl", "--output-prefix", data]
    made = processes.run([sys.executable, repository / "tools" / "preprocess_data.py", *encode], cwd=repository)
    assert made.returncode == 0, made.stderr
    command = [sys.executable, repository / "benchmarks" / "adapters.py", *words(folder, data, "--arms", "lora")]
    for _ in range(2):
        done = processes.run(command, cwd=repository)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "lora, rate" not in done.stdout and "| lora | 0.001 |" in done.stdout
    (file,) = (folder.parent / "results").glob("adapters_*.json")
    (row,) = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert row["optimizer_bytes"] == 2 * row["gradient_bytes"] == 8 * row["trained"] and row["seconds"] > 0
