"""AdamW for matrices whose density changes, and the parameter groups it works on.

    optimizer = MaskedAdamW(parameter_groups(model, controller, config.optimizer), config)
    set_learning_rates(optimizer, lr, controller, config.optimizer)

Sparse matrices of one density share a group, whose learning rate is multiplied and whose weight decay is divided by
min(density^-p, cap). DeepSpeed may replace the parameters of a group by flat pieces of them; names and options stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megasparse.config.schema import OptimizerConfig, SparsityConfig
from megasparse.parallel import shard_spec_of
from megasparse.sparsity.controller import Controller

MAX_WEIGHT_STEPS = 2**15 - 1


def parameter_groups(model: nn.Module, controller: Controller, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups `sparse.<n>` (one per density class), `matrices` (decayed), `vectors` (biases, norms: not decayed)."""
    taken: set[int] = set()
    groups: list[dict[str, Any]] = []

    def add(name: str, parameters: Iterable[nn.Parameter], weight_decay: float, layer: str | None = None) -> None:
        fresh = [parameter for parameter in parameters if id(parameter) not in taken]
        taken.update(id(parameter) for parameter in fresh)
        if fresh:
            groups.append({"name": name, "params": fresh, "weight_decay": weight_decay, "sparse_layer": layer})

    for number, names in enumerate(controller.density_classes().values()):
        weights = [controller.layers[name].weight for name in names]
        add(f"sparse.{number}", weights, optimizer.weight_decay, layer=names[0])
    # By the declared shape: at ZeRO stage 3 the parameters themselves are empty between uses.
    is_matrix = {parameter: len(shard_spec_of(parameter).shape) >= 2 for parameter in model.parameters()}
    add("matrices", (p for p, matrix in is_matrix.items() if matrix), optimizer.weight_decay)
    add("vectors", (p for p, matrix in is_matrix.items() if not matrix), 0.0)
    return groups


def set_learning_rates(
    optimizer: MaskedAdamW, lr: float, controller: Controller, weight_decay: float
) -> dict[str, float]:
    """Put the step's learning rate into every group, scaled by density for sparse ones; returns it by group name."""
    rates = {}
    for group in optimizer.param_groups:
        multiplier = 1.0
        if group["sparse_layer"] is not None:
            multiplier = controller.lr_multiplier(group["sparse_layer"])
            group["weight_decay"] = weight_decay / multiplier
        group["lr"] = rates[group["name"]] = lr * multiplier
    return rates


class MaskedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) with what topology updates ask for.

    ``skip_updates``: while True a step passes without an update of anything (paper preset). ZeRO calls ``step`` once
    for each group, so it is the caller who sets and clears it.
    With `per_weight_step_counts` or `regrowth_warmup_steps` each weight of a sparse group has its own step count,
    the number of updates since it was last grown: moments are corrected by 1 - beta^steps instead of 1 - beta^step, and
    the update of a regrown weight is scaled by min(1, steps / regrowth_warmup_steps).
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, groups: list[dict[str, Any]], optimizer: OptimizerConfig, sparsity: SparsityConfig) -> None:
        super().__init__(
            groups,
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.skip_updates = False
        self.per_weight_step_counts = sparsity.per_weight_step_counts
        self.regrowth_warmup_steps = sparsity.regrowth_warmup_steps

    @property
    def keeps_weight_steps(self) -> bool:
        return self.per_weight_step_counts or self.regrowth_warmup_steps > 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        assert closure is None, "gradients come from the engine"
        if self.skip_updates:
            return None
        if not self.keeps_weight_steps:
            return super().step()
        everything = self.param_groups
        # The library's step works on the groups it is shown; ours takes the groups with per-weight steps.
        self.param_groups = [group for group in everything if group["sparse_layer"] is None]
        super().step()
        self.param_groups = everything
        for group in everything:
            if group["sparse_layer"] is not None:
                for parameter in group["params"]:
                    self._step_by_weight(parameter, group)
        return None

    def _step_by_weight(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["weight_steps"] = torch.zeros_like(parameter, dtype=torch.int16)
        first, second, weight_steps = state["exp_avg"], state["exp_avg_sq"], state["weight_steps"]
        beta1, beta2 = group["betas"]
        state["step"] += 1
        # The bound comes first: one more than MAX_WEIGHT_STEPS would wrap around to a negative number.
        weight_steps.clamp_(max=MAX_WEIGHT_STEPS - 1).add_(1)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        count = weight_steps.to(torch.float32) if self.per_weight_step_counts else state["step"].to(parameter.device)
        update = first / (1 - beta1**count)
        update /= (second / (1 - beta2**count)).sqrt_().add_(group["eps"])
        if self.regrowth_warmup_steps:
            regrown = weight_steps < min(int(state["step"]), MAX_WEIGHT_STEPS)
            ramp = (weight_steps.to(torch.float32) / self.regrowth_warmup_steps).clamp_(max=1)
            update = torch.where(regrown, update * ramp, update)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
