"""The callback that keeps the sums between two lines of metrics, writes the lines, and shows the person how it goes.

It stands after all callbacks that have something to tell, and writes what they left in the ``Step``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from megasparse.config.schema import RunConfig
from megasparse.methods.callback import Callback, Step
from megasparse.monitoring.console import Progress, QuietProgress
from megasparse.monitoring.records import RunRecords
from megasparse.parallel import Mesh
from megasparse.training.state import TrainState, Window


class Metrics(Callback):
    """Lines every `train.log_interval` steps, after the last step, and where another callback asks for one.

    records: None on ranks other than 0. lines_at: further finished steps with a line.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        state: TrainState,
        records: RunRecords | None,
        progress: Progress | QuietProgress,
        lines_at: Collection[int] = (),
    ) -> None:
        self._train, self._mesh, self._state, self._lines_at = config.train, mesh, state, lines_at
        self._of_stage = {} if config.stacking.num_layers is None else {"num_layers": config.model.num_layers}
        self._records, self._progress = records, progress

    def begin_run(self, step: Step) -> None:
        self._tell(step)

    def after_step(self, step: Step) -> None:
        step.beat("records")
        self._tell(step)
        is_due = step.number % self._train.log_interval == 0 or step.number in self._lines_at
        if step.line_due or step.number == self._train.steps or is_due:
            self._write_line(step)

    def _tell(self, step: Step) -> None:
        for note in step.notes:
            self._progress.message(note)
        if self._records is not None:
            for name, lines in step.records.items():
                for line in lines:
                    self._records.record(name, line)
            for name, mask in step.pictures.items():
                self._records.picture(name, mask, step.number)

    def _write_line(self, step: Step) -> None:
        state, ledger = self._state, self._state.ledger
        ledger.seconds.settle()
        tokens_per_s = state.window.tokens / max(ledger.seconds.total - state.window.seconds, 1e-9)
        losses = self._mean_losses()
        state.last_loss = losses.get("loss", state.last_loss)
        state.window = Window(seconds=ledger.seconds.total)
        line: dict[str, Any] = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": None,
            **losses,
            **self._of_stage,
            **step.metrics,
            "lr": step.lr,
            "grad_norm": step.gradient_norm,
            "skipped_steps": state.norms.skipped,
            "tokens_per_s": tokens_per_s,
            "flops_dense": ledger.flops.dense,
            "flops_algorithmic": ledger.flops.algorithmic,
            "flops_executed": ledger.flops.executed,
            **{f"bytes_{kind}": count for kind, count in ledger.sent.items()},
            "seconds": ledger.seconds.total,
            **{f"seconds_{name}": value for name, value in ledger.by_part().items()},
        }
        if self._records is not None:
            self._records.metrics(line)
        self._progress.update(
            state.step,
            loss=line["loss"],
            density=line.get("density", 1.0),
            phase=line.get("phase", ""),
            pattern=line.get("pattern", ""),
            tokens_per_s=tokens_per_s,
            val_loss=line.get("val_loss"),
        )

    def _mean_losses(self) -> dict[str, float]:
        """`loss` and its parts, since the last line, over all ranks; empty where no step had a finite loss."""
        window, ranks = self._state.window, self._mesh.data_parallel
        if not window.steps:
            return {}
        sums = torch.tensor([window.loss, *window.parts.values()], dtype=torch.float64, device=self._mesh.device)
        means = [total / (window.steps * ranks.size) for total in ranks.sum_(sums).tolist()]
        return dict(zip(["loss", *window.parts], means, strict=True))
