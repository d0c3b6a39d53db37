"""Fixtures and settings of all tests: one thread per process, no accelerator, real text where it is at hand."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

# Before torch and DeepSpeed are imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

ROOT = Path(__file__).resolve().parents[1]
# A table of measurements that another run writes meanwhile would change kernels, and with them the last bits.
os.environ.setdefault("MEGASPARSE_CACHE", str(ROOT / ".pytest_cache" / "megasparse"))

import processes  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

WITH_RUNS = ("launch", "distributed", "extensions", "faults")
"""Folders of tests that start runs and take long; those with the longest modules first."""

# The machines of CI are shared: a slow example is no failure, and the same examples must run everywhere.
settings.register_profile("megasparse", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("megasparse")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="also what repeats other tests in further layouts")


def pytest_configure() -> None:
    processes.heed_interrupts()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Workers take modules in this order: those that wait for whole runs begin while others keep the cores busy.
    def place(item: pytest.Item) -> int:
        folders = [ROOT / "tests" / folder for folder in WITH_RUNS]
        return next((n for n, folder in enumerate(folders) if folder in item.path.parents), len(folders))

    items.sort(key=place)
    if not config.getoption("exhaustive"):
        for item in items:
            if item.get_closest_marker("exhaustive"):
                item.add_marker(
                    pytest.mark.skip(reason="repeats other tests in a further layout: --exhaustive runs it")
                )


def pytest_collection_finish() -> None:
    # Modules and tests stay: collections of garbage pass over them.
    gc.freeze()


@pytest.fixture
def unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No measurements of this machine, whatever runs of other tests have measured."""
    from megasparse.kernels.common.tables import BreakEvenTable

    monkeypatch.setattr(BreakEvenTable, "own", lambda table: tmp_path / table.name)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real text beside the repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("there is no ../shared/data beside the repository")
    return path


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """One thread, and a seed of its own for every test; no test leaves its default dtype behind."""
    torch.set_num_threads(1)
    random.seed(1234)
    torch.manual_seed(1234)
    yield
    assert torch.get_default_dtype() == torch.float32
