"""Batches on their way to a GPU: page-locked by the loader's thread, copied without holding up the host."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megasparse.config.loader import check_config
from megasparse.cost.ledger import Ledger
from megasparse.methods.callback import Step
from megasparse.parallel import CommunicationGroup
from megasparse.training.loop import Trainer

CONFIG = check_config({"train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": 3}})


class Numbers:
    def __getitem__(self, number: int) -> np.ndarray:
        return np.arange(number, number + 3)


def trainer_on(device: torch.device) -> SimpleNamespace:
    """What the loop's way of taking a batch needs of a trainer."""
    engine = SimpleNamespace(forward=lambda *batch: torch.zeros(()), backward=lambda loss: None, parts={})
    state = SimpleNamespace(consumed_samples=0, step=0, ledger=Ledger())
    mesh = SimpleNamespace(device=device, data_parallel=CommunicationGroup())
    return SimpleNamespace(
        config=CONFIG, mesh=mesh, state=state, train_data=Numbers(), engine=engine, _micro_batch_sizes=lambda step: 2
    )


@pytest.fixture
def pinned(monkeypatch) -> list[tuple[str, torch.device]]:
    """(Thread, current device) of each batch that was page-locked."""
    calls, current = [], []

    @contextmanager
    def device(chosen):
        current.append(chosen)
        yield
        current.pop()

    def pin_memory(tensor):
        calls.append((threading.current_thread().name, current[-1]))
        return tensor

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return calls


def test_for_a_gpu_the_loaders_thread_locks_the_pages_of_each_batch(pinned) -> None:
    gpu = torch.device("cuda", 1)
    with Trainer.loader(trainer_on(gpu)) as loader:
        assert [batch[:, 0].tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert pinned == [("batch-prefetch", gpu)] * 6


def test_on_a_cpu_nothing_is_page_locked(pinned) -> None:
    with Trainer.loader(trainer_on(torch.device("cpu"))) as loader:
        assert len(list(loader)) == 6
    assert pinned == []


def test_the_copy_does_not_hold_up_the_host() -> None:
    copies = []

    class Samples:
        def to(self, device, non_blocking=False):
            copies.append((device, non_blocking))
            return torch.zeros(2, 3, dtype=torch.int64)

    class Loader:
        target_share = None

        def __next__(self):
            return Samples()

    gpu = torch.device("cuda", 1)
    Trainer._micro_batch(trainer_on(gpu), Loader(), Step(0))
    assert copies == [(gpu, True)]
