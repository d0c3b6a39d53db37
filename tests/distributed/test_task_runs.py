"""A task measured during training: learned, resumed, and the same in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_runs import Layout
from harness import run_distributed
from test_supervised_runs import COMMON, SEQUENCE, distance
from trainer_runs import run_trainers

from megasparse.config.loader import load_config
from megasparse.data.corpus import CorpusReader
from megasparse.data.supervised import ExampleEncoder, ExampleOptions, preprocess_examples
from megasparse.data.tokenizer import load_tokenizer
from megasparse.evaluation.supervised_tasks import open_task

BYTES = load_tokenizer("bytes")
ANSWER = ["task.kind=answer", "task.marker='#'", "task.max_tokens=4", "task.batch_size=3"]
CLASSIFICATION = ["task.kind=classification", "task.batch_size=5"]


def settings(folder: Path, kind: list[str]) -> list[str]:
    data = [f"data.train=[{{path: {folder / 'tasks'}}}]", f"task.path={folder / 'tasks.jsonl'}", "task.limit=9"]
    model = ["data.tokenizer=bytes", "model.vocab_size=257", "optimizer.lr=0.02"]
    return [*COMMON, *data, *kind, *model, "train.steps=36", "train.valid_interval=18"]


def write(folder: Path) -> None:
    """The first letter says the answer."""
    words = [f"{letter}{other}?" for letter in "ab" for other in "cdefghijklmnopqrstuvwxyz"]
    records = [{"prompt": word, "response": f"#{'y' if word[0] == 'a' else 'n'}"} for word in words]
    records = [records[place * 7 % len(records)] for place in range(len(records))]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, records)))
    encoder = ExampleEncoder(BYTES, ExampleOptions())
    preprocess_examples(CorpusReader([folder / "tasks.jsonl"]), encoder, folder / "tasks")


def task_of(config):
    return open_task(config.task, BYTES, config.model.seq_length)


def one_rank(mesh, folder: Path) -> dict:
    cases = [
        ("answer", settings(folder, ANSWER), Layout(), []),
        ("classification", settings(folder, CLASSIFICATION), Layout(), []),
        ("resumed", settings(folder, ANSWER), Layout(), [20]),
    ]
    return run_trainers(mesh, cases, folder / "one", task_of)


def two_ranks(mesh, folder: Path) -> dict:
    cases = [
        ("answer stage 3", settings(folder, ANSWER), Layout(data=2, zero=3), []),
        ("classification stage 3", settings(folder, CLASSIFICATION), Layout(data=2, zero=3), []),
        ("answer sequence", [*settings(folder, ANSWER), *SEQUENCE], Layout(tensor=2), []),
    ]
    return run_trainers(mesh, cases, folder / "two", task_of)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write(folder)
    return folder


def test_accuracy_rises_and_is_the_same_in_every_layout(folder: Path) -> None:
    alone = run_distributed(one_rank, 1, folder)[0]
    for kind in ("answer", "classification"):
        found = accuracies(alone[kind])
        assert len(found) == 2 and found[-1] > 0.5, found
    assert alone["resumed"] == alone["answer"]
    divided, other = run_distributed(two_ranks, 2, folder)
    assert divided == other
    for name, lines in divided.items():
        whole = alone[name.split()[0]]
        # A response may change places with one that is equal but for rounding: none is in these runs.
        assert accuracies(lines) == accuracies(whole), name
        # 36 steps at a high rate carry roundings of 1e-7 on.
        assert distance(lines, whole) < 1e-3, name


def accuracies(lines: list[dict]) -> list[float]:
    return [line["task_accuracy"] for line in lines if "task_accuracy" in line]


def test_the_settings_are_those_of_a_run() -> None:
    config = load_config([], ["task.path=x", *ANSWER])
    assert (config.task.marker, config.task.max_tokens, config.task.batch_size) == ("#", 4, 3)
