"""Progressive layer dropping as a training method (Zhang and He 2020, arXiv 2010.13369).

Block l of L, counted from 1, takes part in step t with probability p = 1 - l / L (1 - theta(t)); what it adds to the
residual stream is divided by p, so that its expectation stays. Attention and MLP are drawn each for itself, or both at
once. Validation, samples and exported models have all layers.

Draws depend on (seed, step, branch) alone: they are the same on every rank and in every micro-batch of a step, and
nothing of them is saved. Steps whose topology update looks at gradients have all layers, as a dropped one would have
none to grow by. A run counts the layers that it computes, a plan those that it may expect.
"""

from __future__ import annotations

import torch

from megasparse.config.schema import RunConfig
from megasparse.layers import Attention, Linear
from megasparse.methods.callback import Engine, Step, TrainingMethod
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.sparsity.controller import stream_number
from megasparse.sparsity.random import WORD, random_words

BRANCHES = ("attention", "mlp")
PLANNED_STRETCHES = 1000
"""A plan looks so many times at theta, whatever the number of steps."""


class LayerDropping(TrainingMethod):
    """model: rank 0's shard on the meta device will do for a plan."""

    name = "layer_dropping"

    def __init__(self, config: RunConfig, model: GPT) -> None:
        self.config, self.model = config, model
        self._is_planned = True
        names = [name for name, module in model.named_modules() if isinstance(module, (Attention, Linear))]
        self._counted = [
            tuple(
                [name for name in names if f"{name}.".startswith(f"layers.{number}.{branch}.")] for branch in BRANCHES
            )
            for number in range(len(model.layers))
        ]
        """Names of what the ledger counts, by block and branch."""

    def attach(self, engine: Engine, mesh: Mesh) -> None:
        self._is_planned = False

    def begin_step(self, step: Step) -> None:
        """After the method that decides on topology updates."""
        settings, steps, layers = self.config.layer_dropping, self.config.train.steps, len(self.model.layers)
        shares = [(1.0, 1.0)] * layers
        if self._is_planned and not step.work.dense_gradient_layers:
            middle = (step.index + self.next_change(step.index, steps) - 1) / 2
            shares = [(p, p) for p in keep_probabilities(settings.theta_at(middle, steps), layers)]
        elif not self._is_planned:
            scales = shares if step.work.dense_gradient_layers else branch_scales(self.config, step.index, layers)
            self.model.set_branch_scales(scales)
            shares = [(float(attention > 0), float(mlp > 0)) for attention, mlp in scales]
        for names, of_block in zip(self._counted, shares, strict=True):
            for of_branch, share in zip(names, of_block, strict=True):
                step.work.computed |= {name: share * step.work.computed.get(name, 1.0) for name in of_branch}
        step.metrics["kept_branches"] = sum(map(sum, shares)) / (2 * layers)

    def after_step(self, step: Step) -> None:
        """Between steps the model has all layers, also where it stays in training mode: the closing sample."""
        self.model.set_branch_scales([(1.0, 1.0)] * len(self.model.layers))

    def next_change(self, index: int, steps: int) -> int:
        return min(index + max(steps // PLANNED_STRETCHES, 1), steps)

    def plan_lines(self) -> list[str]:
        settings, steps, layers = self.config.layer_dropping, self.config.train.steps, len(self.model.layers)
        mean = sum(keep_probabilities(settings.mean_theta(steps), layers)) / layers
        last = keep_probabilities(settings.theta_at(steps - 1, steps), layers)
        what = "attention and MLP together" if settings.together else "attention and MLP each for itself"
        return [
            f"layers are dropped, {what}: {mean:.1%} are computed in the mean, at the end {last[0]:.1%} of the first "
            f"block and {last[-1]:.1%} of the last one"
        ]


def keep_probabilities(theta: float, layers: int) -> list[float]:
    """Of blocks 1 to L: 1 - l / L (1 - theta)."""
    return [1.0 - number / layers * (1.0 - theta) for number in range(1, layers + 1)]


def branch_scales(config: RunConfig, step: int, layers: int) -> list[tuple[float, float]]:
    """What attention and MLP of each block are multiplied by in a step (0-based): 1 / p where kept, else 0."""
    settings = config.layer_dropping
    probabilities = keep_probabilities(settings.theta_at(step, config.train.steps), layers)
    words = random_words(torch.arange(2 * layers), config.run.seed, step, stream_number(LayerDropping.name)).tolist()

    def scale(number: int, word: int) -> float:
        return 1.0 / probabilities[number] if word < probabilities[number] * (WORD + 1) else 0.0

    second = 0 if settings.together else 1
    return [(scale(n, words[2 * n]), scale(n, words[2 * n + second])) for n in range(layers)]


def layer_dropping(config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup) -> LayerDropping | None:
    """None where it is not asked for."""
    return None if config.layer_dropping.theta is None else LayerDropping(config, model)
