"""AdamW for matrices whose density changes, and the parameter groups it works on.

    optimizer = MaskedAdamW(parameter_groups(model, rules, weight_decay), config.optimizer, config.sparsity)
    set_learning_rates(optimizer, lr, rules, weight_decay)

Which parameters share a group of their own, and by what their learning rate and weight decay are multiplied in each
step, is said by rules (``GroupRule``); training methods are such. DeepSpeed may replace the parameters of a group by
flat pieces of them; names and options stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megasparse.config.schema import OptimizerConfig, SparsityConfig
from megasparse.engine.active_regions import ActiveRegions
from megasparse.kernels.optimizer import MAX_WEIGHT_STEPS, AdamWStep, State, adamw_, reference
from megasparse.parallel import shard_spec_of

__all__ = [
    "MAX_WEIGHT_STEPS", "GroupRule", "MaskedAdamW", "Multipliers", "ParameterGroup", "parameter_groups",
    "set_learning_rates",
]  # fmt: skip


Update = Callable[[Tensor, Tensor, float], None]
"""(values, gradient, learning rate): changes values [n] in place. Both are float32 and flat: this rank's piece, at ZeRO
stages 1 to 3 with padding after it; the gradient is averaged and clipped."""


@dataclass(frozen=True)
class ParameterGroup:
    """A group of its own in the optimizer, for the parameters that a rule puts into it."""

    name: str
    masked: bool = False
    """Entries are dropped and grown, so that each may have its own step count."""
    update: Update | None = None
    """Makes the steps of the group in place of AdamW, which then keeps nothing of it; for a single parameter that no
    other rule wants."""


class Multipliers(NamedTuple):
    """By what the learning rate of a group is multiplied and its weight decay divided in one step."""

    lr: float = 1.0
    decay_divisor: float = 1.0


class GroupRule(Protocol):
    """Says which parameters want a learning rate or weight decay of their own."""

    def groups(self) -> Sequence[tuple[ParameterGroup, Sequence[nn.Parameter]]]:
        """Groups with their parameters, the same on every rank, in an order that does not change."""
        ...

    def multipliers(self, group: str) -> Multipliers:
        """For the present step. group: the name of one of its groups."""
        ...


def parameter_groups(model: nn.Module, rules: Sequence[GroupRule], weight_decay: float) -> list[dict[str, Any]]:
    """The groups of the rules, then `matrices` (decayed) and `vectors` (biases, norms: not decayed).

    A parameter that several rules want is in a group of both, whose multipliers are the products of theirs. Each group
    lists its members by rule (`rules`: number of the rule -> name of its group).
    """
    wanted: dict[nn.Parameter, dict[int, ParameterGroup]] = {}
    for number, rule in enumerate(rules):
        for group, parameters in rule.groups():
            for parameter in parameters:
                wanted.setdefault(parameter, {})[number] = group
    # By the declared shape: at ZeRO stage 3 the parameters themselves are empty between uses.
    is_matrix = {parameter: len(shard_spec_of(parameter).shape) >= 2 for parameter in model.parameters()}
    found: dict[str, dict[str, Any]] = {}

    def add(parameter: nn.Parameter, name: str, decay: float, by_rule: Mapping[int, ParameterGroup]) -> None:
        group = found.setdefault(name, {"name": name, "params": [], "weight_decay": decay})
        group["params"].append(parameter)
        group["rules"] = {number: part.name for number, part in by_rule.items()}
        group["masked"] = any(part.masked for part in by_rule.values())
        updates = [part.update for part in by_rule.values() if part.update is not None]
        assert not updates or (len(by_rule) == len(group["params"]) == 1), f"{name}: an update is for one parameter"
        group["update"] = updates[0] if updates else None

    for parameter, by_rule in wanted.items():
        name = "+".join(part.name for part in by_rule.values())
        if is_matrix[parameter]:
            add(parameter, name, weight_decay, by_rule)
        else:
            add(parameter, f"{name}.vectors", 0.0, by_rule)
    for name, kind, decay in (("matrices", True, weight_decay), ("vectors", False, 0.0)):
        for parameter, matrix in is_matrix.items():
            if matrix is kind and parameter not in wanted:
                add(parameter, name, decay, {})
    return list(found.values())


def set_learning_rates(
    optimizer: MaskedAdamW, lr: float, rules: Sequence[GroupRule], weight_decay: float
) -> dict[str, float]:
    """Put the step's learning rate and weight decay into every group; returns the learning rates by group name."""
    rates = {}
    for group in optimizer.param_groups:
        parts = [rules[number].multipliers(name) for number, name in group["rules"].items()]
        group["lr"] = rates[group["name"]] = lr * prod(part.lr for part in parts)
        if parts and group["weight_decay"]:
            group["weight_decay"] = weight_decay / prod(part.decay_divisor for part in parts)
    return rates


class MaskedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) with what topology updates ask for.

    ``skip_updates``: while True a step passes without an update of anything (paper preset). ZeRO calls ``step`` once
    for each group, so it is the caller who sets and clears it.
    With `per_weight_step_counts` or `regrowth_warmup_steps` each weight of a sparse group has its own step count,
    the number of updates since it was last grown: moments are corrected by 1 - beta^steps instead of 1 - beta^step, and
    the update of a regrown weight is scaled by min(1, steps / regrowth_warmup_steps).

    With ``regions`` the kernel for CPUs makes the steps, which passes over inactive blocks. Then gradients may come in
    pieces, in the precision of the model, and not clipped.
    """

    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        groups: list[dict[str, Any]],
        optimizer: OptimizerConfig,
        sparsity: SparsityConfig,
        *,
        per_weight_step_counts: bool = False,
    ) -> None:
        super().__init__(
            groups,
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.skip_updates = False
        self.per_weight_step_counts = per_weight_step_counts or sparsity.per_weight_step_counts
        self.regrowth_warmup_steps = sparsity.regrowth_warmup_steps
        self.regions: ActiveRegions | None = None
        """None: torch's operators step over all weights."""
        self.gradient_scale = 1.0
        """What the kernel multiplies gradients by."""
        self.gradients: dict[Tensor, Sequence[Tensor]] = {}
        """Pieces, one after the other, for the kernel to take instead of the `grad` of a tensor."""
        self.low: dict[Tensor, Tensor] = {}
        """The model's weights, which the kernel makes of those of a tensor, besides."""

    @property
    def keeps_weight_steps(self) -> bool:
        return self.per_weight_step_counts or self.regrowth_warmup_steps > 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        assert closure is None, "gradients come from the engine"
        if self.skip_updates:
            return None
        everything = self.param_groups
        if self.regions is None:
            # The library's step works on the groups it is shown; ours takes the groups with per-weight steps.
            self.param_groups = [group for group in everything if not self._is_ours(group)]
            super().step()
            self.param_groups = everything
        for group in everything:
            if self._is_ours(group):
                for parameter in group["params"]:
                    self._step(parameter, group)
        return None

    def _is_ours(self, group: dict[str, Any]) -> bool:
        by_weight = self.keeps_weight_steps and group["masked"]
        return self.regions is not None or by_weight or group.get("update") is not None

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """All of a parameter, by the kernel where that is used."""
        gradients = self.gradients.get(parameter)
        if gradients is None:
            gradients = [] if parameter.grad is None else [parameter.grad]
        if not gradients:
            return
        if group.get("update") is not None:
            self._update(parameter, torch.cat([gradient.reshape(-1) for gradient in gradients]), group)
            return
        by_weight = self.keeps_weight_steps and group["masked"]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            if by_weight:
                state["weight_steps"] = torch.zeros_like(parameter, dtype=torch.int16)
        state["step"] += 1
        master, first, second = (tensor.view(-1) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]))
        steps = state["weight_steps"].view(-1) if by_weight else None
        whole = State(master, first, second, steps, self.low.get(parameter))
        numbers = self._numbers(int(state["step"]), group)
        if self.regions is None:
            reference.adamw_(whole, gradients[0].view(-1), numbers)
            return
        start = 0
        for gradient in gradients:
            flat = gradient.reshape(-1)
            for piece in self.regions.pieces(parameter, start, flat.numel()):
                of_gradient = flat.narrow(0, piece.start - start, piece.numel)
                adamw_(whole.narrow(piece.start, piece.numel), of_gradient, numbers, piece.active)
            start += flat.numel()

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """By the group's own rule; only steps are counted here."""
        state = self.state[parameter]
        state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1
        group["update"](parameter.view(-1), gradient.to(torch.float32) * self.gradient_scale, group["lr"])
        if parameter in self.low:
            self.low[parameter].view(-1).copy_(parameter.view(-1))

    def _numbers(self, step: int, group: dict[str, Any]) -> AdamWStep:
        beta1, beta2 = group["betas"]
        return AdamWStep(
            step=step,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            epsilon=group["eps"],
            weight_decay=group["weight_decay"],
            gradient_scale=self.gradient_scale,
            by_weight=self.per_weight_step_counts,
            regrowth_warmup_steps=self.regrowth_warmup_steps,
        )
