"""What a run remembers besides weights: position, totals, gradient norms, the window since the last line of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite, sqrt
from statistics import fmean
from typing import Any

from megasparse.cost.ledger import Ledger

RECENT_NORMS = 128
"""Applied steps whose gradient norms say what is usual."""
FEWEST_NORMS = 32
"""With fewer of them nothing counts as unusual: the first norms of a run fall steeply."""


@dataclass
class GradientNorms:
    """Norms of the last applied steps, oldest first, and how many steps were skipped; the same on all ranks."""

    recent: list[float] = field(default_factory=list)
    skipped: int = 0
    """Of the whole run."""
    skipped_in_a_row: int = 0
    """Up to the last step; 0 where that was applied."""

    def objection(self, norm: float, sigma: float | None) -> str | None:
        """Why a step of this norm must be skipped; None: it may be applied.

        sigma: standard deviations above the mean of the recent norms at which one is too large; None: none is.
        """
        if not isfinite(norm):
            return "a loss or gradient is not finite"
        if sigma is None or len(self.recent) < FEWEST_NORMS:
            return None
        mean = fmean(self.recent)
        deviation = sqrt(fmean((other - mean) ** 2 for other in self.recent))
        if norm <= mean + sigma * deviation:
            return None
        return (
            f"gradient norm {norm:.4g} is more than {sigma:g} standard deviations of {deviation:.4g} above "
            f"{mean:.4g}, the mean of the last {len(self.recent)} steps (train.skip_step_sigma)"
        )

    def count(self, norm: float, *, skipped: bool) -> None:
        """Remember the step."""
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            self.recent = [*self.recent, norm][-RECENT_NORMS:]


@dataclass
class Window:
    """Sums since the last logged step, on this rank."""

    loss: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    """Named parts of the loss."""
    steps: int = 0
    """Whose losses are in the sums: all but those with one that is not finite."""
    tokens: int = 0
    seconds: float = 0.0

    @property
    def losses(self) -> dict[str, float]:
        """The sums that are each rank's own: `loss` and its parts, alike on the ranks of a tensor-parallel group."""
        return {"loss": self.loss, **self.parts}

    def set_losses(self, sums: Mapping[str, float]) -> None:
        """Those of `losses` that are named."""
        self.loss = sums.get("loss", self.loss)
        self.parts |= {name: total for name, total in sums.items() if name != "loss"}


@dataclass
class TrainState:
    """Saved with every checkpoint; all ranks hold the same but for the losses in the window and the seconds."""

    step: int = 0
    """Finished optimizer steps."""
    consumed_samples: int = 0
    """Position in the data: samples of all finished steps over all ranks."""
    tokens: int = 0
    best_val_loss: float | None = None
    last_loss: float | None = None
    last_val_loss: float | None = None
    last_task_accuracy: float | None = None
    best_task_accuracy: float | None = None
    norms: GradientNorms = field(default_factory=GradientNorms)
    window: Window = field(default_factory=Window)
    ledger: Ledger = field(default_factory=Ledger)
    lines: dict[str, int] = field(default_factory=dict)
    """Lines of each file of records by its name; rank 0 counts them."""

    def advance(self, losses: Mapping[str, float], consumed_samples: int, tokens: int) -> None:
        """Count a finished step. losses: `loss` and its named parts, means over the micro-batches of this rank; empty
        for a step that has a loss or gradient which is not finite."""
        self.step += 1
        self.consumed_samples = consumed_samples
        self.tokens += tokens
        self.window.tokens += tokens
        if not losses:
            return
        self.window.loss += losses["loss"]
        for name, loss in losses.items():
            if name != "loss":
                self.window.parts[name] = self.window.parts.get(name, 0.0) + loss
        self.window.steps += 1

    def to_dict(self) -> dict[str, Any]:
        self.ledger.seconds.settle()
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        kinds = {"norms": GradientNorms, "window": Window}
        parts = {key: kind(**values.get(key, {})) for key, kind in kinds.items()}
        return cls(**{**values, **parts, "ledger": Ledger.from_state(values["ledger"])})
