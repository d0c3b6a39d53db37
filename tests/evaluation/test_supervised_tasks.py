"""Supervised tasks against a plain computation, example by example and token by token; what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from megasparse.config.loader import ConfigError, check_config, check_values
from megasparse.config.task import TaskConfig
from megasparse.data.tokenizer import load_tokenizer
from megasparse.evaluation.supervised_tasks import Asking, answer_task, classification_task, open_task, result_of
from megasparse.inference.greedy import greedy_answers
from megasparse.models.build import build_model

BYTES = load_tokenizer("bytes")
END = BYTES.end_of_document_id


@pytest.fixture(scope="module")
def model():
    """Random weights large enough that the model prefers something, and ends now and then."""
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 32, "init_std": 0.3}
    config = check_config({"model": shape, "data": {"tokenizer": "bytes"}, "sparsity": {"algorithm": "dense"}})
    torch.manual_seed(1)
    model = build_model(config, BYTES.vocab_size).eval()
    with torch.no_grad():
        model.embedding.tokens.weight[END] *= 3
    return model


def placed(*pairs: tuple[str, str]) -> list[tuple[str, dict]]:
    return [(f"line {n}", {"prompt": prompt, "response": response}) for n, (prompt, response) in enumerate(pairs, 1)]


def likelihood(model, prompt: str, response: str) -> float:
    asked, tokens = BYTES.encode(prompt), [*BYTES.encode(prompt + response), END]
    logs = model(torch.tensor([tokens[:-1]]))[0].detach().double().log_softmax(1)
    return sum(float(logs[place - 1, tokens[place]]) for place in range(len(asked), len(tokens)))


def plain_answer(model, prompt: list[int], max_tokens: int, num_ids: int) -> tuple[list[int], bool]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        if len(tokens) == 32:
            break
        chosen = int(model(torch.tensor([tokens]))[0, -1, :num_ids].argmax())
        if chosen == END:
            return tokens[len(prompt) :], True
        tokens.append(chosen)
    return tokens[len(prompt) :], False


def test_the_likeliest_response_is_chosen(model) -> None:
    chance = random.Random(0)
    prompts = ["".join(chance.choices("abcdef ", k=chance.randint(1, 20))) for _ in range(23)]
    choices = [" yes", " no", " maybe"]
    task = classification_task(placed(*((prompt, chance.choice(choices)) for prompt in prompts)), BYTES, 32, choices)
    found = {size: task.measure(model, Asking(size)) for size in (1, 5, 64)}
    chosen = [max(range(3), key=lambda n, p=prompt: likelihood(model, p, choices[n])) for prompt in prompts]
    right = sum(a == b for a, b in zip(chosen, task.labels, strict=True))
    assert 0 < right < 23
    assert {result["accuracy"] for result in found.values()} == {right / 23}
    assert found[1]["examples"] == 23 and found[1]["largest_class"] >= 1 / 3


def test_answers_of_different_prompts_at_once_are_those_of_each_alone(model) -> None:
    chance = random.Random(1)
    prompts = [chance.choices(range(256), k=chance.randint(1, 31)) for _ in range(40)]
    expected = [plain_answer(model, prompt, 9, 257) for prompt in prompts]
    assert 0 < sum(ended for _, ended in expected) < 40, "the end must come for some"
    assert greedy_answers(model, prompts, 9, end=END, num_ids=257) == expected
    assert greedy_answers(model, prompts[:1], 9, end=END, num_ids=257) == expected[:1]
    assert greedy_answers(model, [], 9, end=END) == []


def test_results_of_answers_are_counted(model) -> None:
    chance = random.Random(2)
    prompts = ["".join(chance.choices("abcdef", k=chance.randint(1, 9))) for _ in range(12)]
    answers = [plain_answer(model, BYTES.encode(prompt), 3, 257) for prompt in prompts]
    wanted = [BYTES.decode(tokens).strip() or "none" for tokens, _ in answers]
    wanted[0] = "another"
    task = answer_task(placed(*zip(prompts, wanted, strict=True)), BYTES, 32, None, 3)
    right = sum(
        ended and BYTES.decode(tokens).strip() == text for (tokens, ended), text in zip(answers, wanted, strict=True)
    )
    assert task.measure(model, Asking(5)) == {
        "accuracy": right / 12,
        "examples": 12,
        "ended": sum(ended for _, ended in answers) / 12,
    }


def test_the_result_stands_behind_the_last_marker() -> None:
    assert result_of(" 3 + 4 = 7\n#### 7 \nmore", "####") == "7"
    assert result_of("#### 3 #### 12", "####") == "12"
    assert result_of("no result", "####") is None
    assert result_of(" yes\n", None) == "yes"


def test_choices_are_those_of_the_file_where_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(record) for _, record in placed(("a", " yes"), ("b", " no"), ("c", " yes"))))
    task = open_task(TaskConfig(path=str(path), kind="classification"), BYTES, 16)
    assert task.choices == [" no", " yes"] and task.labels == [1, 0, 1]
    with pytest.raises(ConfigError, match=r"the responses are 1 different ones"):
        open_task(TaskConfig(path=str(path), kind="classification", limit=1), BYTES, 16)
    with pytest.raises(ConfigError, match=r"data.tokenizer is unset"):
        open_task(TaskConfig(path=str(path)), None, 16)
    with pytest.raises(ConfigError, match=r"task.path: .*nowhere: no such file"):
        open_task(TaskConfig(path="nowhere"), BYTES, 16)


@pytest.mark.parametrize(
    ("pair", "task", "message"),
    [
        (("", "x"), classification_task, r"line 1: prompt: ''; must be a text, not empty"),
        (
            ("a" * 30, " no"),
            classification_task,
            r"line 1: prompt with response ' yes' has 35 tokens; must",
        ),
        (("a", " perhaps"), classification_task, r"line 1: response: ' perhaps'; must be one of task.choices"),
        (("a", "7"), answer_task, r"line 1: response: '7'; must have a result behind '####'"),
        (("a", "####  "), answer_task, r"line 1: response: '####  '; must have a result"),
        (("a" * 30, "#### 7"), answer_task, r"line 1: prompt and response have 37 tokens; must be at most 32"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_its_line(pair, task, message) -> None:
    given = [" yes", " no"] if task is classification_task else "####"
    with pytest.raises(ConfigError, match=message):
        task(placed(pair), BYTES, 32, given)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"choices": ["a", "b"]}, "need kind classification"),
        ({"kind": "classification", "choices": ["a", "a"]}, "name one twice"),
        ({"kind": "classification", "choices": ["a", ""]}, "hold an empty one"),
        ({"kind": "classification", "choices": ["a"]}, "choices"),
        ({"kind": "classification", "marker": "#"}, "must be unset, or a text with kind answer"),
        ({"marker": " "}, "must be unset, or a text"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_settings_that_contradict_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_values(TaskConfig, values)
