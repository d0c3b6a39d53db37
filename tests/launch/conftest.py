"""What several modules of whole runs start from: one corpus, and one uninterrupted run of it on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import command, run, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the indexed data set; nobody writes to it."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two ranks with accumulation, from step 0 to the end in one go; nobody writes to it."""
    folder = tmp_path_factory.mktemp("straight")
    run(command(corpus, folder, "run.name=straight", launcher="deepspeed"))
    return folder / "straight"
