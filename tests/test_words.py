"""What users read has one word for each thing: names of version 0.1 stand nowhere but where they are refused."""

from __future__ import annotations

import re
import sys

import processes
import pytest
import yaml
from test_architecture import ROOT, sources

REPLACED = (
    r"legal values?",
    r"sparsity\.unit\b",
    r"unit_step_counts",
    r"topology steps?",
    r"(?:live|dead|born) (?:units?|weights?|blocks?|entries)",
    r"side path",
    r"\bsensitivity\b",
    r"hybrid_attention=parts",
    r"SparseAdamW",
    r"train\.tensorboard",
)


def found_in(text: str) -> list[str]:
    return [match.group(0) for word in REPLACED for match in re.finditer(word, text, flags=re.IGNORECASE)]


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT)) for p in ROOT.rglob("README.md") if ".venv" not in p.parts])
def test_pages_use_the_words_of_today(page) -> None:
    assert not found_in((ROOT / page).read_text(encoding="utf-8"))


def test_code_and_messages_do() -> None:
    wrong = {}
    for path in sources("megasparse", "launch", "tools", "benchmarks"):
        if path.name != "renamed.py" and (words := found_in(path.read_text(encoding="utf-8"))):
            wrong[str(path.relative_to(ROOT))] = words
    assert not wrong


def test_help_does() -> None:
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--help"]
    done = processes.run(command)
    assert done.returncode == 0, done.stderr
    assert "sparsity.block_size" in done.stdout and not found_in(done.stdout)


def test_a_replaced_word_is_found() -> None:
    assert found_in("the legal values of sparsity.unit") == ["legal values", "sparsity.unit"]


def test_pre_commit_runs_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (ruff,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("ruff-pre-commit")]
    assert f"ruff=={ruff.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
