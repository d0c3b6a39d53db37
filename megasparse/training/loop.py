"""The training loop.

``Trainer.run`` goes through the steps; ``Trainer.train_step`` is one optimizer step. What else happens, and what is
saved of the work, is the business of methods and callbacks, which the loop knows by their hooks alone (``callback``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from megasparse.config.schema import RunConfig
from megasparse.config.stages import growth_step, is_small
from megasparse.cost.layer_kernels import LayerKernels, running_kernels
from megasparse.cost.ledger import FlopCounter
from megasparse.cost.resources import step_bytes
from megasparse.data import BatchLoader, page_locked, split_samples
from megasparse.engine.lr_schedule import decay_start, learning_rate
from megasparse.engine.training_engine import TrainingEngine
from megasparse.launching.failures import SkippedStepsError
from megasparse.launching.watchdog import Watchdog
from megasparse.methods.callback import Beat, Callback, Step, TrainingMethod
from megasparse.parallel import Mesh
from megasparse.sparsity.schedule import build_density_schedule, settings_at
from megasparse.training.build_engine import Renewal
from megasparse.training.signals import StopSignal
from megasparse.training.state import TrainState

GROWTH = "the layers of the small model are copied"
"""Why the loop ends where the run goes on with the whole model (section `stacking`)."""


@dataclass
class Trainer:
    """All that takes part in training, on one rank."""

    config: RunConfig
    mesh: Mesh
    engine: TrainingEngine
    methods: Sequence[TrainingMethod]
    train_data: Any
    state: TrainState
    callbacks: Sequence[Callback] = field(default_factory=list)
    watchdog: Watchdog | None = None
    """None: nobody looks whether the run hangs."""
    renewal: Renewal | None = None
    """None: the engine is never built anew."""

    def __post_init__(self) -> None:
        self._count_flops()
        if self.mesh.device.type == "cuda":
            self.state.ledger.seconds.use_device()
        self._first_step = self.state.step + 1
        self._decay_start = decay_start(self.config)
        self._schedule = build_density_schedule(self.config.sparsity)
        self._growth = growth_step(self.config) if is_small(self.config) else None
        self._stop: StopSignal | None = None

    def run(self, stop: StopSignal) -> str:
        """Train to the end, or to where a signal, `train.stop_after` or the growth of the model ends it. Returns the
        reason, for the summary.

        Raises SkippedStepsError, on all ranks alike, where `train.max_skipped_steps` in a row were skipped.
        """
        train, self._stop = self.config.train, stop
        reason = "finished"
        self._begin_run()
        with self.loader() as loader:
            # A command that has stopped there before, and is given again, trains no further.
            if train.stop_after is not None and train.stop_after <= self.state.step < train.steps:
                reason = f"stopped after step {train.stop_after} (train.stop_after)"
            while reason == "finished" and self.state.step < train.steps:
                self.renew_engine()
                step = self.train_step(loader)
                for callback in self.callbacks:
                    callback.after_step(step)
                if self.state.norms.skipped_in_a_row >= train.max_skipped_steps:
                    raise SkippedStepsError(step.number, self.state.norms.skipped_in_a_row, step.skipped or "")
                if step.stop_asked:
                    reason = f"stopped by {stop.received or 'a signal to another rank'}"
                elif self.state.step == train.stop_after and self.state.step < train.steps:
                    reason = f"stopped after step {train.stop_after} (train.stop_after)"
                elif self.state.step == self._growth:
                    reason = GROWTH
        for hook in (*self.methods, *self.callbacks):
            hook.end_run(reason)
        return reason

    def _begin_run(self) -> None:
        # In a function of its own, as no variable may hold a method when the engine is built anew.
        start = Step(self.state.step - 1)
        for hook in (*self.methods, *self.callbacks):
            hook.begin_run(start)

    def renew_engine(self) -> None:
        """Build the engine anew where packed storage changes its capacity with the next step."""
        capacities = None
        if self.renewal is not None:
            capacities = self.renewal.due(self.engine, self.methods, self.state.step)
        if self.renewal is None or capacities is None:
            return
        if self.watchdog is not None:
            self.watchdog.beat(f"step {self.state.step + 1}: new engine", slow=True)
        with self.state.ledger.seconds.step(), self.state.ledger.seconds.part("topology"):
            # Methods are let go of themselves.
            for callback in self.callbacks:
                callback.release_engine()
            kept = self.renewal.keep(self.engine, self.methods)
            self.engine.close()
            del self.engine, self.methods, self._flops
            self.methods, self.engine = self.renewal.build(kept, capacities)
            self._count_flops()
        for callback in self.callbacks:
            callback.take_engine(self.engine, self.methods)
        for method in self.methods:
            method.begin_run(Step(self.state.step - 1))

    def _count_flops(self) -> None:
        model = self.engine.model
        self._sent: dict[int, dict[str, float]] = {}
        self._flops = FlopCounter(self.config, model, LayerKernels(self.config, model, self.mesh.device.type))

    def _step_bytes(self, micro_batch_size: int) -> dict[str, float]:
        """Bytes that a rank sends in a step of such micro-batches."""
        if micro_batch_size not in self._sent:
            train = self.config.train.model_copy(update={"micro_batch_size": micro_batch_size})
            own = self.config.model_copy(update={"train": train})
            self._sent[micro_batch_size] = step_bytes(own, self.engine.model, self.mesh.world_size)
        return self._sent[micro_batch_size]

    def loader(self) -> BatchLoader:
        """This rank's micro-batches from the present position to the end of the run."""
        train, device = self.config.train, self.mesh.device
        return BatchLoader(
            self.train_data,
            global_batch_size=train.global_batch_size,
            micro_batch_size=self._micro_batch_sizes(self.state.step),
            data_parallel_rank=self.mesh.data_parallel.rank,
            data_parallel_size=self.mesh.data_parallel.size,
            consumed_samples=self.state.consumed_samples,
            num_steps=train.steps - self.state.step,
            prepare=partial(page_locked, device=device) if device.type == "cuda" else None,
        )

    def _micro_batch_sizes(self, first: int) -> int | Callable[[int], int]:
        """Of the steps from `first` on, which number 0 of the function is."""
        config, schedule = self.config, self._schedule
        if not config.train.micro_batch_size_by_phase:
            return config.train.micro_batch_size
        return lambda step: settings_at(config, schedule, first + step).train.micro_batch_size

    def train_step(self, loader: BatchLoader) -> Step:
        """One optimizer step over the global batch, as the methods have it; ``run`` tells the callbacks of it."""
        state, engine, seconds = self.state, self.engine, self.state.ledger.seconds
        step = Step(state.step, state.norms.skipped_in_a_row, beat=self._beat_of(state.step + 1))
        engine.set_micro_batch_size(loader.micro_batch_size)
        if self.config.train.micro_batch_size_by_phase:
            step.metrics["micro_batch_size"] = loader.micro_batch_size
        with seconds.step():
            for hook in (*self.methods, *self.callbacks):
                hook.begin_step(step)
            parts = [self._micro_batch(loader, step) for _ in range(engine.accumulation_steps)]
            flops = self._flops.step(step.work, running_kernels(engine.model))
            losses = step.losses = self._judge(step, parts)
            step.beat("topology")
            with seconds.part("topology"):
                for hook in () if step.skipped else (*self.callbacks, *self.methods):
                    hook.after_backward(step)
            step.lr = learning_rate(step.index, self.config.train.steps, self.config.optimizer, self._decay_start)
            step.beat("optimizer")
            with seconds.part("optimizer"):
                used_norm = engine.step(step.lr, skip_update=step.skip_update)
        state.ledger.flops.add(flops)
        state.ledger.add_sent(self._step_bytes(loader.micro_batch_size))
        tokens = self.config.train.global_batch_size * self.config.model.seq_length
        state.advance(losses if isfinite(step.gradient_norm) else {}, loader.consumed_samples, tokens)
        if not step.skipped:
            step.norm = used_norm
        for method in self.methods:
            method.after_step(step)
        return step

    def _micro_batch(self, loader: BatchLoader, step: Step) -> dict[str, Tensor]:
        """Forward and backward pass of one micro-batch. Returns the loss and its named parts."""
        engine, seconds = self.engine, self.state.ledger.seconds
        step.beat("data")
        with seconds.part("data"):
            samples = next(loader).to(self.mesh.device, non_blocking=True)
            batch = split_samples(samples, loader.target_share)
        step.beat("forward")
        with seconds.part("forward"):
            loss = engine.forward(*batch)
        step.beat("backward")
        with seconds.part("backward"):
            engine.backward(loss)
        return {"loss": loss.detach(), **engine.parts}

    def _judge(self, step: Step, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """Skip the step where its gradients are not finite or too large; all ranks decide alike, before anything has
        changed. Returns the means of the losses of the micro-batches, which the host learns at the same time: only here
        does an ordinary step wait for the device."""
        norms = self.state.norms
        step.beat("gradient norm")
        with self.state.ledger.seconds.part("optimizer"):
            means = {name: torch.stack([part[name] for part in parts]).double().mean() for name in parts[0]}
            asks = self._stop is not None and self._stop.received is not None
            step.norm, losses, step.stop_asked = self.engine.gradient_norm_and(means, asks=asks)
        step.skipped = norms.objection(step.gradient_norm, self.config.train.skip_step_sigma)
        norms.count(step.gradient_norm, skipped=step.skipped is not None)
        if step.skipped:
            step.skip_update = True
            step.notes.append(f"warning: step {step.number:,} is skipped: {step.skipped}")
        return losses

    def _beat_of(self, number: int) -> Beat:
        """What tells the watchdog of step `number`. The first one of a start may be slow: it compiles kernels."""

        def beat(place: str, *, slow: bool = False) -> None:
            if self.watchdog is not None:
                self.watchdog.beat(f"step {number}: {place}", slow=slow or number == self._first_step)

        return beat
