"""Batches of one data-parallel rank, prefetched by a background thread. See `sampler` for the order of samples.

Optimizer step s uses global samples [s G, (s + 1) G). In accumulation micro-step m, rank r of D takes the B samples
that begin at s G + (m D + r) B. So the samples of a step never depend on the layout, only G, B and D's division of
them do. torch is imported on use, because the tools that only write data do not need it.
"""

from __future__ import annotations

import queue
import threading
from math import fsum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch


PADDING_DOCUMENT = 2**31 - 1
"""Number of the document that fills up samples of whole examples: behind all others, as they never decrease."""


class Batch(NamedTuple):
    """Samples as a model takes them, each int64 [B, T]."""

    inputs: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None
    """The document of each input token, where samples tell it."""
    weights: torch.Tensor | None = None
    """Factor of the loss of each target, float32, 0 where it is not learned; None: all 1. Their mean is 1 over all
    samples of an optimizer step, on all ranks, so that the mean over micro-batches and ranks of mean(weights * losses)
    is the mean loss of the targets that are learned, however the step is divided."""

    @property
    def is_example(self) -> torch.Tensor | None:
        """Which inputs do not fill up a sample, bool; None: all."""
        return None if self.documents is None else self.documents != PADDING_DOCUMENT

    @property
    def is_learned(self) -> torch.Tensor | None:
        """Which targets have a loss, bool; None: all."""
        return None if self.weights is None else self.weights > 0


def split_samples(samples: torch.Tensor, target_share: float | None = None) -> Batch:
    """Inputs and targets of samples [B, T + 1], or [B, 2, T + 1] with documents below the tokens, or [B, 3, T + 1] with
    a loss mask below these.

    target_share: mean of the mask over the targets of all samples that a loss is taken over, see ``target_share``.
    """
    if samples.ndim == 2:
        return Batch(samples[:, :-1], samples[:, 1:], None)
    tokens, documents, *masks = samples.unbind(1)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], documents[:, :-1])
    if not masks:
        return batch
    assert target_share is not None, "a loss mask needs the share of the targets that it keeps"
    return batch._replace(weights=masks[0][:, 1:].float() / target_share)


def target_share(dataset, numbers: Iterable[int]) -> float | None:
    """Mean share of the targets of samples `numbers` that have a loss; None where the dataset has no loss masks."""
    shares: list[float] = []
    for number in numbers:
        # A plain list of samples will do as a dataset.
        share = dataset.target_share(number) if hasattr(dataset, "target_share") else None
        if share is None:
            return None
        shares.append(share)
    return fsum(shares) / len(shares)


def page_locked(samples: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of host samples in page-locked memory, from which `device`, a GPU, copies without holding up the host."""
    import torch

    # A thread starts on GPU 0 and would take memory there.
    with torch.cuda.device(device):
        return samples.pin_memory()


class BatchLoader:
    """Iterator over micro-batches, torch int64 [micro_batch_size, *shape of a sample]; a context manager.

    `dataset[n]` gives global sample n as an int64 array, [seq_length + 1] or [2 or 3, seq_length + 1]. The first step
    begins at sample `consumed_samples`; the property of that name grows by `global_batch_size` when the last
    micro-batch of a step has been handed out, and is what a checkpoint saves. The iterator is endless, or ends after
    `num_steps` steps. `micro_batch_size` may be a function of the step, counted from the loader's first one: the
    samples of a step stay the same. An exception of the dataset is raised by the `next` that would have returned the
    failed batch, and the loader is then closed. `prepare` is called with each batch by the background thread.
    """

    def __init__(
        self,
        dataset,
        *,
        global_batch_size: int,
        micro_batch_size: int | Callable[[int], int],
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
        num_steps: int | None = None,
        prefetch: int = 4,
        prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        if not callable(micro_batch_size):
            _check_sizes(global_batch_size, micro_batch_size, data_parallel_size)
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data_parallel_rank is {data_parallel_rank}; must be 0 to {data_parallel_size - 1}")
        for name, value, least in (("consumed_samples", consumed_samples, 0), ("prefetch", prefetch, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.dataset = dataset
        self.global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self.num_steps, self._prepare = num_steps, prepare
        self._start = self._consumed = consumed_samples
        self.target_share: float | None = None
        """Of the optimizer step, over all ranks, that the last micro-batch belongs to; see `target_share`."""
        self._micro_step = self._step = 0
        self._queue: queue.Queue = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def consumed_samples(self) -> int:
        """Global samples of all finished steps, over all ranks."""
        return self._consumed

    @property
    def micro_batch_size(self) -> int:
        """Of the step whose batches are handed out."""
        return self._size_in(self._step)

    @property
    def accumulation_steps(self) -> int:
        """Of the same step."""
        return self._accumulation_in(self._step)

    def sample_numbers(self, step_start: int, micro_step: int) -> range:
        """Global samples of this rank in one micro-step of the step that begins at global sample `step_start`."""
        size = self._size_in((step_start - self._start) // self.global_batch_size)
        slot = micro_step * self.data_parallel_size + self.data_parallel_rank
        first = step_start + slot * size
        return range(first, first + size)

    def _size_in(self, step: int) -> int:
        """step: counted from the first one of this loader."""
        size = self._micro_batch_size
        if not callable(size):
            return size
        found = size(step)
        _check_sizes(self.global_batch_size, found, self.data_parallel_size)
        return found

    def _accumulation_in(self, step: int) -> int:
        return self.global_batch_size // (self._size_in(step) * self.data_parallel_size)

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> torch.Tensor:
        if self._stop.is_set():
            raise StopIteration
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, name="batch-prefetch", daemon=True)
            self._thread.start()
        item = self._take()
        if isinstance(item, BaseException):
            self.close()
            raise item
        samples, self.target_share = item
        self._micro_step += 1
        if self._micro_step == self.accumulation_steps:
            self._micro_step = 0
            self._step += 1
            self._consumed += self.global_batch_size
        return samples

    def _produce(self) -> None:
        try:
            step_start, steps = self._start, 0
            while self.num_steps is None or steps < self.num_steps:
                # Every rank counts the whole step: cheaper than asking the others.
                share = target_share(self.dataset, range(step_start, step_start + self.global_batch_size))
                for micro_step in range(self._accumulation_in(steps)):
                    if not self._put((self._load(self.sample_numbers(step_start, micro_step)), share)):
                        return
                step_start += self.global_batch_size
                steps += 1
            self._put(StopIteration())
        except Exception as error:
            self._put(error)

    def _load(self, numbers: range) -> torch.Tensor:
        import torch

        samples = torch.from_numpy(np.stack([self.dataset[number] for number in numbers]))
        return samples if self._prepare is None else self._prepare(samples)

    def _take(self):
        """The next item; StopIteration if the loader is closed from elsewhere while waiting."""
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
        return StopIteration()

    def _put(self, item) -> bool:
        """Queues an item; False if the loader was closed meanwhile."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def close(self) -> None:
        """Ends the prefetch thread; the iterator then ends. May be called more than once."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        self.close()


def _check_sizes(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> None:
    for name, value in (
        ("global_batch_size", global_batch_size),
        ("micro_batch_size", micro_batch_size),
        ("data_parallel_size", data_parallel_size),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    group = micro_batch_size * data_parallel_size
    if global_batch_size % group:
        below, above = global_batch_size // group * group, (global_batch_size // group + 1) * group
        nearest = f"{below} or {above}" if below else str(above)
        raise ValueError(
            f"global_batch_size is {global_batch_size}; it must be a multiple of micro_batch_size * "
            f"data_parallel_size = {micro_batch_size} * {data_parallel_size} = {group}, for example {nearest}"
        )
