"""The guide to OpenWebText and FineWeb in megasparse/data/README.md: its commands parse, the tools take its files."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megasparse.data import IndexedDataset
from megasparse.data.arguments import reader_from_arguments
from megasparse.data.preprocess import preprocess
from megasparse.data.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
GUIDE = (REPOSITORY / "megasparse" / "data" / "README.md").read_text().split("## OpenWebText and FineWeb")[1]
GUIDE = GUIDE.split("\n## ")[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def commands(tool: str) -> list[list[str]]:
    """Words after `python tools/<tool>.py`, one list per command of the guide."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines]
    script = f"tools/{tool}.py"
    return [line[line.index(script) + 1 :] for line in words if script in line]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(tool: str, words: list[str], monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *words])
    return load_tool(tool).parse_arguments()


@pytest.mark.parametrize(("tool", "number"), [("preprocess_data", 2), ("train_tokenizer", 1)])
def test_the_commands_have_options_that_exist(tool, number, monkeypatch) -> None:
    assert len(commands(tool)) == number
    for words in commands(tool):
        parsed = parse(tool, words, monkeypatch)
        assert all(path.endswith(".jsonl") for path in parsed.input)


def test_an_option_that_does_not_exist_would_be_found(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        parse("preprocess_data", [*commands("preprocess_data")[0], "--output-folder", "x"], monkeypatch)
    assert "--output-folder" in capsys.readouterr().err


def test_the_files_that_one_step_writes_are_those_that_the_next_one_reads() -> None:
    written = set(re.findall(r"corpus/(\w+)-\{number:02\}\.jsonl", "\n".join(blocks("python"))))
    read = {Path(word).name.split("-")[0] for words in commands("preprocess_data") for word in words if "*" in word}
    assert written == read == {"openwebtext", "fineweb"}
    assert "--output data/llama.model" in GUIDE and "--tokenizer-path data/llama.model" in GUIDE


def test_the_python_is_python() -> None:
    assert len(blocks("python")) == 2
    for block in blocks("python"):
        names = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
        assert "load_dataset" in names


def test_records_as_the_guide_writes_them_become_tokens(tmp_path, monkeypatch) -> None:
    """One text a line, with escapes as `json.dumps` and as `Dataset.to_json` write them."""
    texts = ['First document.\n\nWith a "quote".', "Zweites: größer\tals", "x"]
    path = tmp_path / "openwebtext-00.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=n % 2 == 0) + "\n" for n, text in enumerate(texts)))
    words = [str(path) if "*" in word else word for word in commands("preprocess_data")[0]]
    arguments = parse("preprocess_data", words, monkeypatch)
    tokenizer = load_tokenizer("bytes")
    preprocess(reader_from_arguments(arguments), tokenizer, str(tmp_path / "out"))
    documents = [tokenizer.decode(document.tolist()) for document in documents_of(tmp_path / "out")]
    assert documents == texts


def documents_of(prefix: Path):
    dataset = IndexedDataset(prefix)
    return [dataset.document(number) for number in range(len(dataset))]
