"""Runs on supervised data: the loss against a plain one without packing, layouts, accumulation, resumes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_runs import Layout, run_config
from harness import run_distributed
from trainer_runs import run_trainers

from megasparse.data import IndexedDataset, IndexedDatasetWriter, split_samples
from megasparse.data.build import build_data
from megasparse.models.build import build_model
from megasparse.objectives.objective import NextTokenCrossEntropy

COMMON = [
    "model.hidden_size=32",
    "model.seq_length=32",
    "sparsity.block_size=8",
    "sparsity.algorithm=static",
    "sparsity.density=0.5",
    "optimizer.lr=0.01",
    "data.document_masking=true",
    "data.reset_positions=true",
    "data.valid_fraction=0.2",
    "train.steps=12",
    "train.log_interval=1",
    "train.valid_interval=4",
    "train.valid_samples=7",
]
SEQUENCE = ["parallel.sequence_parallel=true"]

# As in test_attention_runs: float32 carries 1.2e-7, and operations are done in another order. Some tens of targets have
# a loss here instead of hundreds, so that less averages out.
LOSS_RTOL = 5e-6


def write_examples(prefix: Path, vocab_size: int = 64) -> Path:
    """A prompt tells the first token of an answer and its step; answers are 1 to 20 tokens long, so that the samples
    of a step differ much in how many they have."""
    chance = random.Random(0)
    with IndexedDatasetWriter(prefix, "uint16", loss_mask=True) as writer:
        for _ in range(400):
            first, step = chance.randrange(vocab_size - 2), chance.randrange(1, 8)
            answer = [1 + (first + i * step) % (vocab_size - 2) for i in range(chance.choice((1, 2, 3, 20)))]
            asked = [step, vocab_size - 1, *chance.choices(range(1, 60), k=chance.randint(0, 6)), 1 + first]
            writer.add_document([*asked, *answer, 0], [0] * len(asked) + [1] * (len(answer) + 1))
    return prefix


def one_rank(mesh, folder: Path) -> dict[str, Any]:
    given = [*COMMON, f"data.train=[{{path: {folder / 'tasks'}}}]"]
    cases = [
        ("alone", given, Layout(), []),
        ("accumulated", given, Layout(accumulation=4), []),
        ("resumed", given, Layout(), [2, 7]),
    ]
    return run_trainers(mesh, cases, folder / "one")


def two_ranks(mesh, folder: Path) -> dict[str, Any]:
    given = [*COMMON, f"data.train=[{{path: {folder / 'tasks'}}}]"]
    cases = [
        ("data", given, Layout(data=2, accumulation=2), []),
        ("stage 2", given, Layout(data=2, zero=2, accumulation=4), []),
        ("stage 3", given, Layout(data=2, zero=3), []),
        ("tensor", given, Layout(tensor=2, accumulation=2), []),
        ("sequence", [*given, *SEQUENCE], Layout(tensor=2), []),
    ]
    return run_trainers(mesh, cases, folder / "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_examples(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, list[dict]]:
    return run_distributed(one_rank, 1, folder)[0]


@pytest.fixture(scope="module")
def divided(folder) -> dict[str, list[dict]]:
    first, second = run_distributed(two_ranks, 2, folder)
    assert first == second
    return first


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines] + [line["val_loss"] for line in lines if "val_loss" in line]


def distance(lines: list[dict], others: list[dict]) -> float:
    return max(abs(a - b) / b for a, b in zip(losses(lines), losses(others), strict=True))


def test_the_loss_does_not_depend_on_accumulation(alone) -> None:
    assert alone["alone"][-1]["loss"] < alone["alone"][0]["loss"] - 0.1, "nothing was learned"
    assert distance(alone["accumulated"], alone["alone"]) < LOSS_RTOL


def test_a_run_on_supervised_data_resumes_exactly(alone) -> None:
    assert alone["resumed"] == alone["alone"]


@pytest.mark.parametrize("name", ["data", "stage 2", "stage 3", "tensor", "sequence"])
def test_every_layout_gives_the_curve_of_one_process(alone, divided, name) -> None:
    assert distance(divided[name], alone["alone"]) < LOSS_RTOL


def test_loss_and_gradients_are_those_of_the_examples_alone(folder) -> None:
    """Micro-batches of one sample each against every example in a pass of its own, with torch's cross entropy: the mean
    over all tokens that are learned, however they are packed and divided."""
    given = [*COMMON, "sparsity.algorithm=dense", f"data.train=[{{path: {folder / 'tasks'}}}]"]
    config = run_config(given)
    train, _ = build_data(config, 64)
    model, plain = build_model(config, 64), build_model(config, 64)
    samples = torch.stack([torch.from_numpy(train[number]) for number in range(5)])
    share = sum(train.target_share(number) for number in range(5)) / 5
    parts = [NextTokenCrossEntropy()(model, split_samples(sample[None], share)).loss for sample in samples]
    loss = torch.stack(parts).mean()
    loss.backward()

    total, count = torch.zeros(()), 0
    for tokens, documents, mask in samples:
        for number in documents.unique():
            own = documents == number
            learned = mask[own][1:] == 1
            if learned.any():
                logits = plain(tokens[own][None, :-1])[0]
                total = total + F.cross_entropy(logits[learned], tokens[own][1:][learned], reduction="sum")
                count += int(learned.sum())
    (total / count).backward()
    # A few dozen float32 operations on sums of some hundred terms.
    torch.testing.assert_close(loss, total / count, rtol=2e-6, atol=0)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert IndexedDataset(folder / "tasks").loss_mask is not None
