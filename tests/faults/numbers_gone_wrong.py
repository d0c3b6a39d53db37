"""Numbers that go wrong while a run trains: a NaN in a gradient, a bit of a mask in memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from attempt import SILENT, Attempt
from comparison import differences
from planted import wrap
from tiny_run import STEPS

NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def nan_gradient(attempt: Attempt) -> None:
    """Skipped on all ranks, and told; or the run ends with a sentence. Stopping in between changes nothing."""
    chance = attempt.chance
    step, rank, value = chance.randint(1, STEPS), chance.randrange(attempt.layout.ranks), chance.choice(NOT_FINITE)
    parameter = chance.random()
    attempt.fault = f"{value} in a gradient of rank {rank} at step {step}"
    prepare = _planted_gradient(rank, step, value, parameter)
    attempt.begin_new()
    ended = attempt.start(prepare=prepare)
    if any(ended.statuses):
        # What was committed is good.
        attempt.finish()
        return
    if "skip" not in ended.text.lower():
        attempt.found.append((SILENT, "a step with a gradient that is not finite was not told"))
        return
    once = attempt.run.with_name("once")
    attempt.run.rename(once)
    attempt.start(f"train.stop_after={chance.randint(1, STEPS - 1)}", prepare=prepare)
    attempt.start(prepare=prepare)
    if odd := differences(attempt.run, once):
        attempt.found.append((SILENT, f"stopped in between: {'; '.join(odd)}"))


def mask_bit(attempt: Attempt) -> None:
    """A bit of a mask flips after a step: found before anything is made of it, or without consequence."""
    chance = attempt.chance
    step, rank, place = chance.randint(3, 9), chance.randrange(attempt.layout.ranks), chance.random()
    attempt.fault = f"a mask bit of rank {rank} flips after step {step}"
    attempt.begin_new()
    ended = attempt.start(prepare=_planted_bit(rank, step, place))
    if any(ended.statuses):
        attempt.finish()
    else:
        attempt.compare(ended)


def _planted_gradient(rank: int, step: int, value: float, place: float) -> Callable[[int], None]:
    """One gradient of `rank` holds the value in the last micro-batch of `step`; place: of the parameter, in [0, 1)."""
    under_way = [0]

    def train_step(original: Callable[..., Any], trainer: Any, *arguments: Any) -> Any:
        # DeepSpeed's own count begins anew with each start.
        under_way[0] = trainer.state.step + 1
        return original(trainer, *arguments)

    def backward(original: Callable[..., Any], engine: Any, loss: Any) -> Any:
        if under_way[0] == step and engine._engine.is_gradient_accumulation_boundary():
            parameters = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
            chosen = parameters[int(place * len(parameters))]
            handle = chosen.register_hook(lambda gradient: gradient.fill_(value))
            try:
                return original(engine, loss)
            finally:
                handle.remove()
        return original(engine, loss)

    def prepare(own: int) -> None:
        if own == rank:
            wrap("megasparse.training.loop:Trainer.train_step", train_step)
            wrap("megasparse.engine.training_engine:TrainingEngine.backward", backward)

    return prepare


def _planted_bit(rank: int, step: int, place: float) -> Callable[[int], None]:
    def train_step(original: Callable[..., Any], trainer: Any, *arguments: Any) -> Any:
        result = original(trainer, *arguments)
        if trainer.state.step == step:
            topologies = list(trainer.methods[0].controller.topologies.values())
            chance = random.Random(place)
            bits = chance.choice(topologies).mask.view(-1)
            bits[chance.randrange(len(bits))] ^= True
        return result

    def prepare(own: int) -> None:
        if own == rank:
            wrap("megasparse.training.loop:Trainer.train_step", train_step)

    return prepare
