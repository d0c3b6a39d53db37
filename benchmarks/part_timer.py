"""Seconds of a training step by part, from hooks on the modules of the model.

    timer = PartTimer(trainer)
    with timer.attached():
        trainer.train_step(loader)
    timer.seconds()          # {"forward.linear": 0.41, "backward.attention": 0.12, ...}, summed over the steps

Parts are exclusive: `attention` is what its projections leave. A part is what lies between two marks, so that nothing
is counted twice; on a GPU marks are events, and nothing waits for them. The head makes its gradients in the forward
pass, so they count there. Hooks cost some microseconds per module: take whole steps without them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from megasparse.layers import MLP, Attention, HeadInChunks, Linear, Normalization
from megasparse.training.loop import Trainer

PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (Linear,),
    "attention": (Attention,),
    "head": (HeadInChunks,),
    "norm": (Normalization,),
    "activation": (MLP,),
}
PHASES = {"forward": "forward", "backward": "backward", "step": "optimizer"}


class PartTimer:
    """The parts of `PARTS` in the forward and in the backward pass, the loss, the optimizer, and what is left."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._device = trainer, trainer.mesh.device
        self._phase, self._stack = "other", ["other"]
        self._marks: list[tuple[str, Any]] = []

    def seconds(self) -> dict[str, float]:
        """Seconds by part, since the beginning."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            found[name] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
        return dict(found)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, the trainer's steps are measured."""
        engine, handles = self._trainer.engine, []
        for module in engine.model.modules():
            for part, kinds in PARTS.items():
                if isinstance(module, kinds):
                    handles += self._hook(module, part)
        vocabulary = engine.model.vocabulary
        restored = [self._wrap(vocabulary, "cross_entropy_", lambda: f"{self._phase}.loss")]
        restored += [self._wrap(engine, method, lambda phase=phase: phase) for method, phase in PHASES.items()]
        self._enter("other")
        yield
        self._leave("other")
        for restore in restored:
            restore()
        for handle in handles:
            handle.remove()

    def _hook(self, module: nn.Module, part: str) -> list[Any]:
        def enter(*_: object) -> None:
            self._enter(f"{self._phase}.{part}")

        def leave(*_: object) -> None:
            self._leave(f"{self._phase}.{part}")

        return [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
            module.register_full_backward_pre_hook(enter),
            module.register_full_backward_hook(leave),
        ]

    def _wrap(self, owner: Any, method: str, part: Callable[[], str]) -> Callable[[], None]:
        """Mark beginning and end of a method; returns what undoes it."""
        inner = getattr(owner, method)

        def marked(*arguments: Any, **keywords: Any) -> Any:
            name, before = part(), self._phase
            self._phase = name.partition(".")[0]
            self._enter(name)
            result = inner(*arguments, **keywords)
            self._leave(name)
            self._phase = before
            return result

        setattr(owner, method, marked)
        return lambda: delattr(owner, method)

    def _enter(self, name: str) -> None:
        self._stack.append(name)
        self._mark()

    def _leave(self, name: str) -> None:
        assert self._stack[-1] == name, f"{name} ends inside of {self._stack[-1]}"
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        now: Any = time.perf_counter()
        if self._device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((self._stack[-1], now))
