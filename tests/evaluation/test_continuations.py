"""Last words and multiple choice: what is scored, how it is counted, and what is refused with its line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megasparse.data.tokenizer import load_tokenizer
from megasparse.evaluation.continuations import encode_pair, last_word_task, multiple_choice_task
from megasparse.evaluation.inputs import read_jsonl, read_text

BYTES = load_tokenizer("bytes")


class Pairs:
    """A tokenizer whose tokens are two characters wide: it joins across the end of a context of odd length."""

    name, vocab_size, end_of_document_id = "pairs", 300, 299

    def encode(self, text: str) -> list[int]:
        return [sum(text[start : start + 2].encode()) % 290 for start in range(0, len(text), 2)]


def placed(*records) -> list[tuple[str, dict]]:
    return [(f"line {number}", record) for number, record in enumerate(records, 1)]


def decoded(window) -> tuple[str, str]:
    tokens = window.tokens.tolist()
    return BYTES.decode(tokens[: window.first]), BYTES.decode(tokens[window.first :])


def test_pairs_are_encoded_together() -> None:
    assert encode_pair(BYTES, "ab  ", "cd") == (BYTES.encode("ab"), BYTES.encode("  cd"))
    assert encode_pair(BYTES, "", "cd") == ([256], BYTES.encode("cd"))
    assert encode_pair(BYTES, " \n", "cd") == ([256], BYTES.encode(" \ncd"))
    context, continuation = encode_pair(Pairs(), "abc", "d")
    assert len(context) == 2 and continuation == []


def test_the_last_word_is_split_off() -> None:
    task = last_word_task(
        placed({"text": "the cat sat down."}, {"text": "said  Bob\n"}, {"text": "x" * 50 + " end"}), BYTES, 16
    )
    assert [decoded(window) for window in task.windows] == [
        ("the cat sat", " down."),
        ("said", "  Bob"),
        ("x" * 13, " end"),
    ]
    results = task.results(np.array([[-2.0, 1.0], [-3.0, 0.0], [-1.0, 1.0]]))
    assert results["accuracy"] == pytest.approx(2 / 3) and results["examples"] == 3
    assert results["perplexity_per_last_word"] == pytest.approx(math.exp(2.0))
    assert results["perplexity"] == pytest.approx(math.exp(6.0 / 15))


def test_choices_are_compared_as_they_are_and_by_length() -> None:
    records = placed(
        {"context": "One is", "choices": ["no", "ünder"], "label": 1},
        {"context": "Two is ", "choices": ["a", " bb", "ccc"], "label": 2},
        {"context": "", "choices": ["yes", "no"], "label": 0},
    )
    task = multiple_choice_task(records, BYTES, 32)
    assert [decoded(window) for window in task.windows] == [
        ("One is", " no"), ("One is", " ünder"),
        ("Two is", " a"), ("Two is", "  bb"), ("Two is", " ccc"),
        ("", "yes"), ("", "no"),
    ]  # fmt: skip
    # First: 2 characters and bytes against 5 characters, 6 bytes. Plain: -4 wins. Per character: -2.0 against -2.1.
    # Per byte: -2.0 against -1.75. Second: right by all. Third: equal, and the first is right.
    nats = [-4.0, -10.5, -9.0, -12.0, -3.0, -1.0, -1.0]
    results = task.results(np.array([[value, 0.0] for value in nats]))
    assert results["accuracy"] == pytest.approx(2 / 3)
    # Third: -1/3 against -1/2.
    assert results["accuracy_per_character"] == pytest.approx(2 / 3)
    assert results["accuracy_per_byte"] == 1.0
    assert (results["examples"], results["choices"]) == (3, 7)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"txt": "a b"}, r"line 1: text: missing; must be a text, not empty"),
        ({"text": 3}, r"line 1: text: 3; must"),
        ({"text": "  "}, r"line 1: text: '  '; must"),
        ({"text": " word "}, r"line 1: text: ' word' is a single word"),
        ({"text": "a \ud800"}, r"line 1: text: not valid Unicode"),
        ({"text": "a " + "b" * 20}, r"line 1: text: 'b+' has 21 tokens of its own; must be 1 to 16"),
    ],
)
def test_bad_passages_are_refused(record: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        last_word_task(placed(record), BYTES, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 2}, r"line 1: label: 2; must be 0 to 1"),
        ({"label": -1}, r"line 1: label: -1; must"),
        ({"label": "0"}, r"line 1: label: '0'; must"),
        ({"label": True}, r"line 1: label: True; must"),
        ({"label": None}, r"line 1: label: None; must"),
        ({"choices": ["a"]}, r"line 1: choices: \['a'\]; must be a list of two or more texts"),
        ({"choices": "ab"}, r"line 1: choices: 'ab'; must"),
        ({"choices": ["a", ""]}, r"line 1: choices: \['a', ''\]; must"),
        ({"choices": ["a", "b" * 17]}, r"line 1: choices\[1\]: 'b+' has 18 tokens"),
        ({"choices": ["a", "\udfff"]}, r"line 1: choices\[1\]: not valid Unicode"),
        ({"context": None}, r"line 1: context: None; must be a text"),
    ],
)
def test_bad_choices_are_refused(changes: dict, message: str) -> None:
    record = {"context": "c", "choices": ["a", "b"], "label": 0} | changes
    with pytest.raises(ValueError, match=message):
        multiple_choice_task(placed(record), BYTES, 16)


def test_a_continuation_that_its_context_swallows_is_refused() -> None:
    record = {"context": "abc", "choices": ["d", "e"], "label": 0}
    with pytest.raises(ValueError, match=r"choices\[0\]: 'd' has 0 tokens of its own"):
        multiple_choice_task(placed(record), Swallowing(), 16)


class Swallowing(Pairs):
    """A tokenizer that has one token for everything."""

    def encode(self, text: str) -> list[int]:
        return [1]


def test_lines_are_read_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a b"}\n\n{"text": "c\u2028d"}\n', encoding="utf-8")
    rows = list(read_jsonl(str(path)))
    assert [where.rsplit(" ", 1)[1] for where, _ in rows] == ["1", "3"] and rows[1][1]["text"] == "c\u2028d"
    assert len(list(read_jsonl(str(path), limit=1))) == 1
    for content, message in (
        ('{"text": "a b"}\n{"text": ', r"x.jsonl, line 2: not JSON"),
        ("[1]\n", r"line 1: list; must be one JSON object a line"),
        ("\n \n", r"no text in it"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            list(read_jsonl(str(path)))
    path.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="not UTF-8 text; byte 0xff at offset 2"):
        read_text(str(path))
    with pytest.raises(ValueError, match="no such file"):
        read_text(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="cannot be read"):
        read_text(str(tmp_path))
    (tmp_path / "x.gz").write_text("no archive")
    with pytest.raises(ValueError, match="cannot be read"):
        read_text(str(tmp_path / "x.gz"))


def test_byte_order_marks_are_no_text_and_utf_16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n', encoding="utf-8")
    assert [record["text"] for _, record in read_jsonl(str(path))] == ["a", "b"]
    path.write_text("\ufeffa text \ufeff\n", encoding="utf-8")
    assert read_text(str(path)) == "a text \ufeff\n"
    path.write_text("a text", encoding="utf-16")
    with pytest.raises(ValueError, match=r"--input: .*x.jsonl: UTF-16 text, by its byte-order mark; must be UTF-8"):
        read_text(str(path))


def test_json_escapes_survive(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "für dich"}))
    ((_, record),) = read_jsonl(str(path))
    assert record["text"] == "für dich"
