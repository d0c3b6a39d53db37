"""Word problems: answers are right, splits share no numbers and no wording, and the tool writes what can be learned."""

from __future__ import annotations

import json
import re

import pytest
from tool_calls import call

from megasparse.studies.word_problems import MARKER, SPLITS, TEMPLATES, TEST_TEMPLATES, word_problems


def test_every_line_of_an_answer_is_right_and_the_last_is_the_result() -> None:
    for split in SPLITS:
        for record in word_problems(split, 200, seed=3):
            *work, last = record["response"].split("\n")
            values = []
            for line in work:
                left, operator, right, value = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", line).groups()
                left, right = int(left), int(right)
                assert int(value) == {"+": left + right, "-": left - right, "*": left * right}[operator]
                values.append(int(value))
            assert last == f"{MARKER} {values[-1]}"


def test_splits_share_neither_problems_nor_the_test_wordings() -> None:
    found = {split: word_problems(split, 400, seed=0) for split in SPLITS}
    numbers = {
        split: {tuple(sorted(map(int, re.findall(r"\d+", record["prompt"])))) for record in records}
        for split, records in found.items()
    }
    assert not numbers["train"] & (numbers["valid"] | numbers["test"])
    shapes = {split: {shape(record) for record in records} for split, records in found.items()}
    assert not shapes["test"] & (shapes["train"] | shapes["valid"])
    assert len(shapes["train"]) == len(TEMPLATES) and len(shapes["test"]) == len(TEST_TEMPLATES)
    assert found["train"] == word_problems("train", 400, seed=0) != word_problems("train", 400, seed=1)
    with pytest.raises(ValueError, match="split: dev; must be one of train, valid, test"):
        word_problems("dev", 1, seed=0)


def test_small_numbers_and_known_wordings(tmp_path) -> None:
    words = ("arithmetic", "--train", 300, "--valid", 40, "--test", 60, "--output", tmp_path, "--known-wordings")
    status, output = call("make_tasks", *words, "--largest", 12)
    assert status == 0, output
    found = {
        split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()] for split in SPLITS
    }
    assert {split: len(records) for split, records in found.items()} == {"train": 300, "valid": 40, "test": 60}
    prompts = {split: {record["prompt"] for record in records} for split, records in found.items()}
    assert not prompts["train"] & (prompts["valid"] | prompts["test"]) and not prompts["valid"] & prompts["test"]
    assert max(int(number) for record in found["train"] for number in re.findall(r"\d+", record["prompt"])) == 12
    assert {shape(record) for record in found["test"]} <= {shape(record) for record in found["train"]}
    status, output = call("make_tasks", *words, "--largest", 4)
    assert status == 2 and "largest: 4; must be from 5 to 99" in output


def shape(record: dict[str, str]) -> str:
    """The wording without numbers, names and things."""
    text = re.sub(r"\d+", "#", record["prompt"])
    text = re.sub(r"\b(Ann|Ben|Cleo|Dan|Eva|Finn|Gina|Hugo|Ida|Jack|Kim|Leo)\b", "N", text)
    return re.sub(r"\b(apples|books|coins|stamps|marbles|pens|shells|cards)\b", "T", text)


def test_the_tool_writes_both_tasks(tmp_path) -> None:
    words = ("--train", 30, "--valid", 5, "--output", tmp_path / "numbers")
    status, output = call("make_tasks", "arithmetic", *words, "--test", 7)
    assert status == 0, output
    lines = {split: (tmp_path / "numbers" / f"{split}.jsonl").read_text().splitlines() for split in SPLITS}
    assert {split: len(found) for split, found in lines.items()} == {"train": 30, "valid": 5, "test": 7}
    rows = [f"film {number} \t{number % 2}" for number in range(9)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na fine film \t1\n")
    words = ("--input", tmp_path / "train.tsv", tmp_path / "dev.tsv", "--valid", 2, "--output", tmp_path / "films")
    status, output = call("make_tasks", "sst2", *words, "--train", 6)
    assert status == 0, output
    films = {split: [json.loads(line) for line in (tmp_path / "films" / f"{split}.jsonl").open()] for split in SPLITS}
    assert films["test"] == [{"prompt": "a fine film\nSentiment:", "response": " positive"}]
    assert (len(films["train"]), len(films["valid"])) == (6, 2)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na fine film\t2\n")
    status, output = call("make_tasks", "sst2", *words)
    assert status == 2 and "dev.tsv, line 2:" in output and "must be a sentence, a tab and 0 or 1" in output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("arithmetic", "--train", 0), "--train: 0; must be 1 or more"),
        (("arithmetic", "--test", -3), "--test: -3; must be 1 or more"),
        (("arithmetic", "--train", 10**11), f"train: {10**11} examples; must be at most 1000000"),
        (("sst2", "--train", -1, "--input", "empty.tsv", "empty.tsv"), "--train: -1; must be 1 or more"),
        (("sst2", "--input", "empty.tsv", "header.tsv"), "empty.tsv: no text in it; must be"),
        (("sst2", "--input", "header.tsv", "empty.tsv"), "has no rows; must have one"),
        (("sst2", "--input", "missing.tsv", "empty.tsv"), "missing.tsv; must be a file"),
    ],
)
def test_what_no_task_can_be_made_of_is_refused_and_nothing_is_written(words, told, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "header.tsv").write_text("sentence\tlabel\n")
    status, output = call("make_tasks", *words, "--output", tmp_path / "task")
    assert status == 2 and told in output
    assert not (tmp_path / "task").exists()
