"""benchmarks/accuracy_and_speed.py: sizes and accuracy against plain counts; how fast it was is not asked."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trained_model import VOCABULARY, model_config, write_folder

from megasparse.inference.generation import generate
from megasparse.models.build import build_model

EXAMPLES = [{"prompt": f"{n} is", "response": " odd" if n % 2 else " even"} for n in range(8)]
TOKENS = 5


@pytest.fixture
def benchmark(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return importlib.import_module("accuracy_and_speed")


def write_models(folder: Path) -> dict[str, torch.nn.Module]:
    """Two random models, the second of fewer layers, as folders of their names."""
    models = {}
    for name, layers in (("dense", 2), ("small", 1)):
        config = model_config(num_layers=layers)
        models[name] = build_model(config, VOCABULARY).eval()
        weights = {key: parameter.detach() for key, parameter in models[name].named_parameters()}
        write_folder(folder / name, config, weights)
    return models


@torch.no_grad()
def plain_accuracy(model: torch.nn.Module) -> float:
    """Share of examples whose response is likelier than the other one, with the end of the document."""
    right = 0
    for example in EXAMPLES:
        scores = {}
        for response in (" odd", " even"):
            prompt, rest = list(example["prompt"].encode()), [*response.encode(), 256]
            logits = model(torch.tensor([prompt + rest]))[0, len(prompt) - 1 : -1, :VOCABULARY]
            scores[response] = logits.log_softmax(-1)[range(len(rest)), rest].sum().item()
        right += max(scores, key=scores.__getitem__) == example["response"]
    return right / len(EXAMPLES)


def test_its_numbers_are_those_of_a_plain_count(benchmark, monkeypatch, tmp_path) -> None:
    models, task, decoded = write_models(tmp_path), tmp_path / "task.jsonl", []
    task.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES), encoding="utf-8")

    def noted(model, start, tokens, **options):
        decoded.append((start.tolist(), generate(model, start, tokens, **options).shape[1] - start.shape[1]))

    monkeypatch.setattr(benchmark, "generate", noted)
    given = [f"{name}={tmp_path / name}" for name in models]
    options = ["--name", "tiny", "--threads", "1", "--tokens", str(TOKENS), "--rounds", "3"]
    words = ["accuracy_and_speed.py", "--models", *given, "--task", task, *options, "--results", tmp_path / "results"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    benchmark.main()
    (file,) = (tmp_path / "results").glob("accuracy_and_speed_tiny_*.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["task"], found["tokens"], found["threads"]) == ("task.jsonl", TOKENS, 1)
    assert [row["name"] for row in found["models"]] == list(models) and found["models"][0]["speedup"] == 1.0
    for row, model in zip(found["models"], models.values(), strict=True):
        assert row["megabytes"] == pytest.approx(4e-6 * sum(p.numel() for p in model.parameters()))
        assert row["results"]["accuracy"] == pytest.approx(plain_accuracy(model)) and row["packed_layers"] == 0
    # Each round decodes from the first prompt, with each model.
    prompt = list(EXAMPLES[0]["prompt"].encode())
    assert len(decoded) >= 6 and len(decoded) % 2 == 0 and all(each == ([prompt], TOKENS) for each in decoded)


def test_only_packed_layers_change_the_size(benchmark) -> None:
    layers = [(True, 10, 40), (False, 90, 40), (True, 30, 20)]
    names = ("is_packed", "num_bytes", "dense_bytes")
    plan = SimpleNamespace(layers=[SimpleNamespace(**dict(zip(names, row, strict=True))) for row in layers])
    assert benchmark.saved(plan) == -20
