"""Runs in which losses and gradients of chosen steps go wrong on one rank; on every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_runs import Layout, check_state, divided, model_weight, run_config
from torch import Tensor
from trainer_runs import train_run

from megasparse.data import Batch
from megasparse.engine.restore import optimizer_step
from megasparse.launching.failures import SkippedStepsError
from megasparse.methods.callback import Callback, Step
from megasparse.models.gpt import GPT
from megasparse.objectives.objective import NextTokenCrossEntropy, ObjectiveResult
from megasparse.parallel import Mesh
from megasparse.training.loop import Trainer

FAULTS = {
    # Before there are moments.
    0: ("gradient", math.inf),
    # In a topology update, whose scores would be NaN.
    6: ("gradient", math.nan),
    8: ("loss", math.nan),
    # In a topology update again: far above the others, and finite.
    39: ("gradient", 1e4),
    40: ("gradient", 1e4),
}
"""Step -> what is multiplied by what."""
STEPS = 48


@dataclass
class Faulty:
    """Next-token prediction whose loss, or the gradient that flows into it, is multiplied on the last rank."""

    is_last: bool
    faults: dict[int, tuple[str, float]]
    step: int = 0
    plain: NextTokenCrossEntropy = field(default_factory=NextTokenCrossEntropy)

    def __call__(self, model: GPT, batch: Batch) -> ObjectiveResult:
        loss, parts = self.plain(model, batch)
        kind, factor = self.faults.get(self.step, ("", 1.0))
        if self.is_last and kind == "loss":
            # The gradient stays as it is.
            loss = loss + factor
        if self.is_last and kind == "gradient" and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * factor)
        return ObjectiveResult(loss, parts)


@dataclass
class Watch(Callback):
    """Compares the state before and after each skipped step, bit for bit."""

    trainer: Trainer
    objective: Faulty
    skipped: list[int] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def begin_step(self, step: Step) -> None:
        self.objective.step = step.index
        self.before = self.state()

    def after_step(self, step: Step) -> None:
        engine, (method,) = self.trainer.engine, self.trainer.methods
        after = self.state()
        if step.skipped:
            self.skipped.append(step.index)
            assert set(after) == set(self.before)
            different = [key for key in after if not torch.equal(after[key], self.before[key])]
            assert not different, f"step {step.index} is skipped and changed {different}"
        else:
            assert int(after["optimizer step"]) == int(self.before["optimizer step"]) + 1
            self.norms.append(self.trainer.state.norms.recent[-1])
            if not method.controller.decision.changes_topology:
                # bfloat16 gradients carry 3 digits; DeepSpeed adds up in its own order.
                assert math.isclose(self.norms[-1], step.gradient_norm, rel_tol=1e-3)
        if "topology" in step.records:
            self.updates.append(step.index)
        if step.index > 0:
            check_state(engine, method.controller)

    def state(self) -> dict[str, Tensor]:
        """This rank's weights, moments and masks."""
        engine, (method,) = self.trainer.engine, self.trainer.methods
        parameters = dict(engine.model.named_parameters())
        result = {"optimizer step": torch.tensor(optimizer_step(engine)), **method.controller.state()}
        for name, fragment in engine.access(parameters).fragments().items():
            result[f"{name}/master"] = fragment.master.clone()
            result |= {f"{name}/{kind}": moment.clone() for kind, moment in fragment.moments.items()}
        return result | {f"{name}/model": model_weight(parameter) for name, parameter in parameters.items()}


def run_faulty(
    mesh: Mesh, cases: list[tuple[str, list[str], Layout]], folder: Path, stops: list[int | None]
) -> dict[str, dict[str, Any]]:
    """What was skipped, the steps of topology updates, and the lines of metrics, by case. stops: of each leg."""
    meshes = {size: divided(mesh, size) for size in sorted({layout.tensor for _, _, layout in cases})}
    results = {}
    for name, overrides, layout in cases:
        own = meshes[layout.tensor]
        result = results[name] = {"skipped": [], "updates": [], "norms": [], "lines": []}
        for stop in stops:
            ending = [] if stop is None else [f"train.stop_after={stop}"]
            config = run_config([*overrides, *ending], layout)
            objective, watches = Faulty(mesh.rank == mesh.world_size - 1, FAULTS), []

            def watch(trainer: Trainer, objective=objective, watches=watches) -> Watch:
                watches.append(Watch(trainer, objective))
                return watches[-1]

            try:
                result["lines"] += train_run(own, config, folder / name, objective, watch)
            except Exception as error:
                raise RuntimeError(f"case {name}") from error
            for key in ("skipped", "updates", "norms"):
                result[key] += getattr(watches[0], key)
    return results


def run_to_the_limit(mesh: Mesh, overrides: list[str], folder: Path) -> dict[str, Any]:
    """A run without faults; one that skips more steps than it may; and what comes of that when it goes on."""
    config, results = run_config(overrides, Layout(2)), {}
    results["straight"] = train_run(mesh, config, folder / "straight")
    objective = Faulty(mesh.rank == 1, dict.fromkeys(range(14, 48), ("gradient", math.nan)))
    try:
        train_run(mesh, config, folder / "run", objective, lambda trainer: Watch(trainer, objective))
    except SkippedStepsError as error:
        results["error"] = str(error)
    mesh.barrier()
    results["saved"] = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    mesh.barrier()
    results["resumed"] = train_run(mesh, config, folder / "run")
    return results
