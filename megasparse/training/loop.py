"""The training loop.

``Trainer.run`` goes through the steps: train, record, and now and then validate, save, or exit. ``Trainer.train_step``
is one optimizer step and nothing else. Everything the loop works with is passed in.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from megasparse.config.schema import RunConfig
from megasparse.cost.layer_kernels import LayerKernels, describe_changes
from megasparse.cost.ledger import FlopCounter
from megasparse.data import BatchLoader, split_samples
from megasparse.engine.training_engine import TrainingEngine
from megasparse.launching.watchdog import Watchdog
from megasparse.monitoring.console import Progress, QuietProgress
from megasparse.monitoring.records import RunRecords
from megasparse.parallel import Mesh
from megasparse.sparsity.controller import Controller, StepDecision, TopologyReport
from megasparse.sparsity.replicas import check_replicas, is_replica_check_due
from megasparse.training.checkpoints import Checkpointer
from megasparse.training.lr_schedule import learning_rate
from megasparse.training.signals import StopSignal
from megasparse.training.state import TrainState, Window
from megasparse.training.validation import validation_loss

REMEDY = "go on from an older checkpoint with a lower optimizer.lr or a longer optimizer.warmup_steps"


class NonFiniteError(ArithmeticError):
    """The loss or a gradient became NaN or infinite; all ranks raise it at the same step."""


@dataclass
class StepResult:
    """What one optimizer step did."""

    decision: StepDecision
    lr: float
    gradient_norm: float
    topology: TopologyReport | None


@dataclass
class Trainer:
    """All that takes part in training, on one rank. records is None on ranks other than 0."""

    config: RunConfig
    mesh: Mesh
    engine: TrainingEngine
    controller: Controller
    train_data: Any
    valid_data: Any
    checkpointer: Checkpointer
    records: RunRecords | None
    progress: Progress | QuietProgress
    state: TrainState
    watchdog: Watchdog | None = None
    """None: nobody looks whether the run hangs."""

    def __post_init__(self) -> None:
        kernels = LayerKernels(self.config, self.engine.model, self.mesh.device.type)
        self._kernels, self._flops = kernels, FlopCounter(self.config, self.engine.model, kernels)
        self._chosen = kernels.choices(self.controller.active_densities())
        self._pictures = _picture_steps(self.config)
        self._first_step = self.state.step + 1

    def run(self, stop: StopSignal) -> str:
        """Train to the end, or to where a signal or `train.stop_after` ends it. Returns the reason, for the summary."""
        train = self.config.train
        reason, saved_step = "finished", self.state.step
        self._draw_topologies(self.state.step)
        with self.loader() as loader:
            while self.state.step < train.steps:
                result = self.train_step(loader)
                self._record(result)
                if stop.agreed():
                    reason = f"stopped by {stop.received or 'a signal to another rank'}"
                elif self.state.step == train.stop_after and self.state.step < train.steps:
                    reason = f"stopped after step {train.stop_after} (train.stop_after)"
                if reason != "finished":
                    break
                if train.save_interval and self.state.step % train.save_interval == 0:
                    self._beat(self.state.step, "checkpoint", slow=True)
                    self.checkpointer.save(self.state)
                    saved_step = self.state.step
        if saved_step != self.state.step:
            self._beat(self.state.step, "checkpoint", slow=True)
            folder = self.checkpointer.save(self.state)
            self.progress.message(f"checkpoint {folder.name} saved")
        return reason

    def loader(self) -> BatchLoader:
        """This rank's micro-batches from the present position to the end of the run."""
        train = self.config.train
        return BatchLoader(
            self.train_data,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            data_parallel_rank=self.mesh.data_parallel.rank,
            data_parallel_size=self.mesh.data_parallel.size,
            consumed_samples=self.state.consumed_samples,
            num_steps=train.steps - self.state.step,
        )

    def train_step(self, loader: BatchLoader) -> StepResult:
        """One optimizer step over the global batch."""
        state, engine, seconds = self.state, self.engine, self.state.ledger.seconds
        step = state.step + 1
        with seconds.step():
            decision = self.controller.begin_step(state.step)
            engine.model.set_attention_patterns(decision.patterns)
            flops = self._flops.step(decision, self.controller.active_densities())
            losses, parts = [], []
            for _ in range(engine.accumulation_steps):
                self._beat(step, "data")
                with seconds.part("data"):
                    batch = split_samples(next(loader).to(self.mesh.device))
                self._beat(step, "forward")
                with seconds.part("forward"):
                    loss = engine.forward(*batch)
                self._beat(step, "backward")
                with seconds.part("backward"):
                    engine.backward(loss)
                losses.append(loss.detach())
                parts.append(engine.parts)
            self._beat(step, "topology")
            topology = self._update_topology(decision)
            lr = learning_rate(state.step, self.config.train.steps, self.config.optimizer)
            skip = topology is not None and self.config.sparsity.skip_optimizer_on_update
            self._beat(step, "optimizer")
            with seconds.part("optimizer"):
                norm = engine.step(lr, skip_update=skip)
        state.ledger.flops.add(flops)
        self._advance(losses, parts, loader.consumed_samples)
        return StepResult(decision, lr, norm, topology)

    def _beat(self, step: int, part: str, *, slow: bool = False) -> None:
        if self.watchdog is not None:
            self.watchdog.beat(f"step {step}: {part}", slow=slow or step == self._first_step)

    def _update_topology(self, decision: StepDecision) -> TopologyReport | None:
        if not decision.changes_topology:
            return None
        with self.state.ledger.seconds.part("topology"):
            # Before the change, which takes the bits from other ranks and so hides a wrong one.
            if is_replica_check_due(decision.step, self.config):
                check_replicas(self.controller.topologies, self.mesh)
            if self.engine.gradients_are_finite():
                return self.controller.update_topology(self.engine.state)
            # A float16 gradient that overflowed ranks nothing, and its optimizer step will be skipped.
            if self.config.train.precision == "fp16":
                return None
            raise NonFiniteError(f"a gradient is NaN or infinite at topology update {decision.step}; {REMEDY}")

    def _advance(self, losses: list[torch.Tensor], parts: list[dict[str, torch.Tensor]], consumed_samples: int) -> None:
        state = self.state
        tokens = self.config.train.global_batch_size * self.config.model.seq_length
        state.step += 1
        state.consumed_samples = consumed_samples
        state.tokens += tokens
        state.window.loss += float(torch.stack(losses).double().mean())
        for name in parts[0]:
            mean = float(torch.stack([part[name] for part in parts]).double().mean())
            state.window.parts[name] = state.window.parts.get(name, 0.0) + mean
        state.window.steps += 1
        state.window.tokens += tokens

    def _record(self, result: StepResult) -> None:
        """Validate where it is due, and write a line of metrics where one is due."""
        train, step = self.config.train, self.state.step
        self._beat(step, "records")
        last = step == train.steps
        if result.topology is not None:
            self._note_kernels(step)
            if self.records is not None:
                self.records.topology(result.topology, self.kernel_counts())
        if step in self._pictures or last:
            self._draw_topologies(step)
        validates = self.valid_data is not None and (
            last or (train.valid_interval and step % train.valid_interval == 0)
        )
        if validates:
            self.state.last_val_loss = self._validate()
        if validates or last or step % train.log_interval == 0:
            self._beat(step, "records")
            self._write_metrics(result, self.state.last_val_loss if validates else None)

    def kernel_counts(self) -> dict[str, int]:
        """Number of sparse layers by the kernel that computes them."""
        return dict(Counter(self._chosen.values()))

    def _note_kernels(self, step: int) -> None:
        chosen = self._kernels.choices(self.controller.active_densities())
        for change in describe_changes(self._chosen, chosen):
            self.progress.message(f"step {step:,}: kernels: {change}")
        self._chosen = chosen

    def _validate(self) -> float:
        train = self.config.train
        self._beat(self.state.step, "validation", slow=True)
        loss = validation_loss(self.engine, self.valid_data, train.valid_samples, train.micro_batch_size, self.mesh)
        best = self.state.best_val_loss
        self.state.best_val_loss = loss if best is None else min(best, loss)
        return loss

    def _write_metrics(self, result: StepResult, val_loss: float | None) -> None:
        state, ledger = self.state, self.state.ledger
        window = state.window
        sums = torch.tensor([window.loss, *window.parts.values()], dtype=torch.float64, device=self.mesh.device)
        ranks = self.mesh.data_parallel
        loss, *means = (total / (window.steps * ranks.size) for total in ranks.sum_(sums).tolist())
        parts = dict(zip(window.parts, means, strict=True))
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss} at step {state.step}; {REMEDY}")
        tokens_per_s = window.tokens / max(ledger.seconds.total - window.seconds, 1e-9)
        state.last_loss = loss
        state.window = Window(seconds=ledger.seconds.total)
        decision = result.decision
        if self.records is not None:
            line = {
                "step": state.step,
                "tokens": state.tokens,
                "loss": loss,
                **parts,
                **({} if val_loss is None else {"val_loss": val_loss}),
                "density": self.controller.density(),
                "phase": decision.phase,
                "pattern": decision.pattern,
                "lr": result.lr,
                "grad_norm": result.gradient_norm,
                "tokens_per_s": tokens_per_s,
                "flops_dense": ledger.flops.dense,
                "flops_algorithmic": ledger.flops.algorithmic,
                "flops_executed": ledger.flops.executed,
                "seconds": ledger.seconds.total,
                **{f"seconds_{name}": value for name, value in ledger.by_part().items()},
            }
            self.records.metrics(line)
        self.progress.update(
            state.step,
            loss=loss,
            density=self.controller.density(),
            phase=decision.phase,
            pattern=decision.pattern,
            tokens_per_s=tokens_per_s,
            val_loss=val_loss,
        )

    def _draw_topologies(self, step: int) -> None:
        for name in _drawn_layers(list(self.controller.topologies)):
            mask = self.controller.whole_mask(name)
            if self.records is not None:
                self.records.picture(name, mask, step)


def _picture_steps(config: RunConfig) -> set[int]:
    """About eight steps, each just after a topology update, spread over the run."""
    interval = config.sparsity.update_interval
    updates = range(interval, config.train.steps, interval)
    stride = max(len(updates) // 8, 1)
    return {step + 1 for step in updates[::stride]}


def _drawn_layers(names: list[str]) -> list[str]:
    """First, middle and last sparse layer."""
    return list(dict.fromkeys(names[index] for index in (0, len(names) // 2, -1))) if names else []
