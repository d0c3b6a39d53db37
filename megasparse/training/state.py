"""What a run remembers besides weights: position, totals, and the window since the last line of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from megasparse.cost.ledger import Ledger


@dataclass
class Window:
    """Sums since the last logged step, on this rank."""

    loss: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    """Named parts of the loss. After a restart every rank goes on from those of rank 0."""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class TrainState:
    """Saved with every checkpoint; all ranks hold the same but for the loss in the window and the seconds."""

    step: int = 0
    """Finished optimizer steps."""
    consumed_samples: int = 0
    """Position in the data: samples of all finished steps over all ranks."""
    tokens: int = 0
    best_val_loss: float | None = None
    last_loss: float | None = None
    last_val_loss: float | None = None
    window: Window = field(default_factory=Window)
    ledger: Ledger = field(default_factory=Ledger)

    def advance(self, losses: Sequence[Mapping[str, Tensor]], consumed_samples: int, tokens: int) -> None:
        """Count a finished step. losses: `loss` and its named parts, of each micro-batch of this rank."""
        self.step += 1
        self.consumed_samples = consumed_samples
        self.tokens += tokens
        means = {name: float(torch.stack([part[name] for part in losses]).double().mean()) for name in losses[0]}
        self.window.loss += means.pop("loss")
        for name, mean in means.items():
            self.window.parts[name] = self.window.parts.get(name, 0.0) + mean
        self.window.steps += 1
        self.window.tokens += tokens

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        plain = {key: value for key, value in values.items() if key not in ("window", "ledger")}
        return cls(**plain, window=Window(**values["window"]), ledger=Ledger.from_state(values["ledger"]))
