"""Fixtures of the data tests: real text where it is at hand, a small trained tokenizer, a helper that runs tools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def wikitext_valid() -> Path:
    path = SHARED / "wikitext-2" / "valid.txt"
    if not path.exists():
        pytest.skip("WikiText-2 is not at ../shared/data")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.exists():
        pytest.skip("there is no ../shared/data")
    return SHARED


@pytest.fixture(scope="session")
def python_sources() -> Path:
    """A folder of Python files that exists wherever the tests run."""
    return ROOT / "megasparse" / "data"


def train_model(folder: Path, sources: Path, model_type: str) -> Path:
    from megasparse.data.corpus import CorpusOptions, CorpusReader
    from megasparse.data.tokenizer_training import train_sentencepiece

    path = folder / f"{model_type}.model"
    train_sentencepiece(
        CorpusReader([sources], CorpusOptions(glob="*.py")), path, vocab_size=700, model_type=model_type
    )
    return path


@pytest.fixture(scope="session")
def bpe_model(tmp_path_factory, python_sources) -> Path:
    """A BPE model of 700 pieces."""
    return train_model(tmp_path_factory.mktemp("tokenizer"), python_sources, "bpe")


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def trained_model(request, tmp_path_factory, python_sources) -> Path:
    """Models of 700 pieces, one of each type."""
    return train_model(tmp_path_factory.mktemp("tokenizer"), python_sources, request.param)


@pytest.fixture(scope="session")
def run_tool():
    """Runs tools/<name>.py with arguments, after an optional launcher; returns the finished process."""

    def run(name: str, *arguments, launcher=(), first_on_path=None) -> subprocess.CompletedProcess:
        command = [*launcher, sys.executable, ROOT / "tools" / f"{name}.py", *arguments]
        path = str(ROOT) if first_on_path is None else f"{first_on_path}{os.pathsep}{ROOT}"
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return processes.run(command, env=environment)

    return run
