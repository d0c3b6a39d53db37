"""DiscQuant (arXiv 2501.06417): which of its two neighbours on the grid each weight goes to, learned from data.

    rounded = round_weights(teacher, {"layers.0.mlp.up": layer}, windows, options, advance)
    rounded.matrices["layers.0.mlp.up"]

A weight between the levels `down` and `up` = down + 1, at the fraction y of the way, becomes w(x) = (down + x) times
its scale, x in [0, 1]. Minimised is a linear term that pushes x to the nearer end, plus the divergence of the model's
predictions:

    gradient of x = -(2 y - 1) + clamp(strength * d KL(teacher || w(x)) / dx, -1, 1)

by Adam with a cosine learning rate, x kept in [0, 1], beginning at random; at the end x is rounded. Weights that lie on
the grid have no x: a pruned weight is level 0 and stays it. Teacher, student, and for each free weight x, its gradient
and two moments are in memory: this is the one part that wants the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasparse.kernels.quantized import QuantizedMatrix, largest_level, row_scales
from megasparse.kernels.quantized.grid import expanded
from megasparse.models.gpt import GPT

LARGEST_PULL = 1.0
"""Of the divergence, against a linear term of at most 1."""
AT_AN_END = 1e-2


@dataclass(frozen=True)
class DiscQuantOptions:
    """The paper's values for 3 bits in groups of 32."""

    bits: int
    group: int | None
    steps: int = 1024
    batch: int = 8
    """Windows a step, evaluated one by one."""
    lr: float = 0.1
    strength: float = 200.0
    """Of the divergence, which is a mean over tokens."""
    seed: int = 0


@dataclass(frozen=True)
class Rounded:
    matrices: dict[str, QuantizedMatrix]
    settled: float
    """Share of the free weights that were within 1e-2 of a level before they were rounded."""


class _Choice:
    """The free weights of one layer: those that lie between two levels."""

    def __init__(self, weight: nn.Parameter, bits: int, group: int | None, generator: torch.Generator) -> None:
        self.weight, self.scales = weight, row_scales(weight.detach(), bits, group)
        largest = largest_level(bits)
        self._scale = expanded(self.scales, weight.shape[1]).expand_as(weight)
        places = (weight.detach() / self._scale).clamp(-largest, largest)
        self.down = places.floor()
        self.free = places != self.down
        self.linear = 1 - 2 * (places - self.down)[self.free]
        drawn = torch.rand(len(self.linear), generator=generator)
        self.x = nn.Parameter(drawn.to(weight.device))

    @torch.no_grad()
    def put(self) -> None:
        """w(x) into the student."""
        self.weight.copy_(self._levels(self.x) * self._scale)

    @torch.no_grad()
    def pull(self, strength: float) -> None:
        """The gradient of x from that of the weight, which goes."""
        assert self.weight.grad is not None
        of_divergence = (self.weight.grad * self._scale)[self.free]
        self.x.grad = self.linear + (strength * of_divergence).clamp_(-LARGEST_PULL, LARGEST_PULL)
        self.weight.grad = None

    @torch.no_grad()
    def rounded(self) -> QuantizedMatrix:
        return QuantizedMatrix(self._levels(self.x.round()).to(torch.int8), self.scales)

    def num_settled(self) -> int:
        x = self.x.detach()
        return int(((x - x.round()).abs() <= AT_AN_END).sum())

    def _levels(self, x: Tensor) -> Tensor:
        levels = self.down.clone()
        levels[self.free] += x
        return levels


def round_weights(
    teacher: GPT,
    layers: Sequence[str],
    windows: Tensor,
    options: DiscQuantOptions,
    advance: Callable[[int], None] = lambda done: None,
) -> Rounded:
    """Choose the levels of these layers' weights.

    teacher: the model in float32, in evaluation mode; stays as it is. windows: int64 [samples, T]. advance: called
    with 1 after each step.
    """
    generator = torch.Generator().manual_seed(options.seed)
    student = copy.deepcopy(teacher).requires_grad_(False)
    choices = _choices(student, layers, options, generator)
    optimizer = torch.optim.AdamW([choice.x for choice in choices.values()], lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in range(options.steps):
        for choice in choices.values():
            choice.put()
        for sample in torch.randint(len(windows), (options.batch,), generator=generator).tolist():
            (_divergence(teacher, student, windows[sample : sample + 1]) / options.batch).backward()
        for choice in choices.values():
            choice.pull(options.strength)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for choice in choices.values():
                choice.x.clamp_(0.0, 1.0)
        advance(1)
    free = sum(len(choice.x) for choice in choices.values())
    settled = sum(choice.num_settled() for choice in choices.values())
    return Rounded({name: choice.rounded() for name, choice in choices.items()}, settled / max(free, 1))


def _choices(
    student: GPT, layers: Sequence[str], options: DiscQuantOptions, generator: torch.Generator
) -> Mapping[str, _Choice]:
    found = {}
    for name in layers:
        weight = student.get_submodule(name).weight.requires_grad_()
        assert isinstance(weight, nn.Parameter)
        found[name] = _Choice(weight, options.bits, options.group, generator)
    return found


def _divergence(teacher: GPT, student: GPT, tokens_BT: Tensor) -> Tensor:
    """KL(teacher || student), mean over tokens."""
    tokens_BT = tokens_BT.to(next(student.parameters()).device)
    with torch.no_grad():
        expected = teacher(tokens_BT).flatten(0, 1).float().log_softmax(-1)
    found = student(tokens_BT).flatten(0, 1).float().log_softmax(-1)
    return F.kl_div(found, expected, log_target=True, reduction="batchmean")
