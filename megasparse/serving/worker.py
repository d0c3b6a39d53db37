"""The thread in which the model computes, so that the event loop never waits for it.

worker = Worker(batch)
worker.start()
worker.submit(streams)          # RequestError where the queue is full
worker.stop(seconds=5)          # all streams are told
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from megasparse.serving.batch import Batch
from megasparse.serving.errors import OVERLOADED, SERVER, RequestError, shutting_down
from megasparse.serving.stream import Stream

LOG = logging.getLogger(__name__)


class Worker:
    """Steps a batch as long as there are streams; the batch belongs to its thread."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._changed = threading.Condition()
        self._new: list[Stream] = []
        self._open = 0
        self.stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    @property
    def num_streams(self) -> int:
        """Running and waiting."""
        return self._open

    def start(self) -> None:
        self._thread.start()

    def submit(self, streams: Sequence[Stream]) -> None:
        """Take all of them or none. Raises RequestError, status 503, where they do not fit into the queue."""
        limits = self._batch.limits
        with self._changed:
            if self.stopping:
                raise shutting_down()
            if self._open + len(streams) > limits.streams + limits.queue:
                raise RequestError(
                    f"{self._open} texts are being written or wait; this server takes "
                    f"{limits.streams + limits.queue}, so that {len(streams)} more have no place",
                    status=503,
                    kind=OVERLOADED,
                    code="queue_full",
                    retry_after=2,
                )
            self._new += streams
            self._open += len(streams)
            self._changed.notify()

    def stop(self, seconds: float = 10.0) -> None:
        """End all streams with an error and wait for the thread, at most so long."""
        with self._changed:
            self.stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        while self._take_new():
            try:
                self._batch.step()
            except Exception as error:
                # The server lives on: whatever one text has set off, memory that is out for instance, ends them all.
                LOG.exception("a step of the batch failed")
                message = f"the model failed: {type(error).__name__}"
                self._batch.end_all(RequestError(message, status=500, kind=SERVER, code="model_failed"))
        self._batch.end_all(shutting_down())
        self._open = 0

    def _take_new(self) -> bool:
        """Wait until there is something to do; False: to stop."""
        with self._changed:
            while True:
                self._batch.waiting.extend(self._new)
                self._new = []
                self._open = self._batch.num_streams
                if self._open or self.stopping:
                    return not self.stopping
                self._changed.wait()
