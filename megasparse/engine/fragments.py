"""The only module that touches private parts of DeepSpeed's optimizers.

A rank's pieces of weights, moments and gradients, as views that are edited in place between ``backward`` and ``step``:

- ``WholeState``: ZeRO stage 0 in float32; every rank holds everything in the parameters themselves.
- ``PartitionedState``: ZeRO stage 1; a rank holds one slice of each flat parameter group. DeepSpeed's record of where a
  parameter's piece lies (``_hp_mapping``) has no public form.

``state_access`` picks the right one and checks, once, that the installed DeepSpeed has what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from megasparse.parallel import Mesh
from megasparse.sparsity.state import StateAccess, StateFragment

MOMENTS = ("exp_avg", "exp_avg_sq", "age")


def state_access(
    engine: Any, optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter], mesh: Mesh
) -> StateAccess:
    """The view of the training state for the engine's ZeRO stage.

    weights: parameters of the sparse matrices by layer name. Raises RuntimeError where DeepSpeed lacks a part.
    """
    if engine.zero_optimization_stage() == 0:
        return WholeState(optimizer, weights)
    for name, weight in weights.items():
        if not hasattr(weight, "_hp_mapping"):
            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__} keeps no map of parameter pieces (weight {name}); "
                "versions 0.19.x are tested"
            )
    return PartitionedState(engine.optimizer, optimizer, weights, mesh)


class WholeState:
    """Every rank holds all of every matrix; gradients are already averaged into ``parameter.grad``."""

    is_sharded = False

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
        self._optimizer, self._weights = optimizer, weights

    def fragments(self) -> dict[str, StateFragment]:
        return {name: self._fragment(weight) for name, weight in self._weights.items()}

    def sum_over_shards(self, tensor: Tensor) -> None:
        """Nothing to add: there is one shard."""

    def _fragment(self, weight: nn.Parameter) -> StateFragment:
        state = self._optimizer.state.get(weight, {})
        gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        moments = {key: state[key].view(-1) for key in MOMENTS if key in state}
        return StateFragment(0, weight.detach().view(-1), gradient.view(-1), moments)


class PartitionedState:
    """A rank holds one slice of each flat parameter group, and of a matrix at most one piece."""

    def __init__(
        self,
        zero_optimizer: Any,
        optimizer: torch.optim.Optimizer,
        weights: Mapping[str, nn.Parameter],
        mesh: Mesh,
    ) -> None:
        self._zero_optimizer, self._optimizer = zero_optimizer, optimizer
        self._weights, self._mesh = weights, mesh

    @property
    def is_sharded(self) -> bool:
        return self._mesh.data_parallel.size > 1

    def fragments(self) -> dict[str, StateFragment]:
        owned = {name: weight for name, weight in self._weights.items() if weight._hp_mapping is not None}
        return {name: self._fragment(weight) for name, weight in owned.items()}

    def sum_over_shards(self, tensor: Tensor) -> None:
        self._mesh.data_parallel.sum_(tensor)

    def _fragment(self, weight: Any) -> StateFragment:
        piece = weight._hp_mapping
        return StateFragment(
            start=piece.lp_fragment_address.start,
            master=piece.hp_fragment.detach(),
            gradient=self._gradient(weight),
            moments=self._moments(piece),
            gradient_scale=float(self._zero_optimizer.loss_scale),
        )

    def _moments(self, piece: Any) -> dict[str, Tensor]:
        """Slices of the flat group's moments; they do not exist before the first optimizer step.

        DeepSpeed's own `optim_fragment` is filled after the first group's first step, when the other groups have no
        moments yet, and then never again: it stays empty for all groups but one.
        """
        flat = self._optimizer.param_groups[piece.param_group_index]["params"][0]
        state, address = self._optimizer.state.get(flat, {}), piece.hp_fragment_address
        return {key: state[key].narrow(0, address.start, address.numel) for key in MOMENTS if key in state}

    def _gradient(self, weight: Any) -> Tensor:
        """The averaged gradient of this rank's piece; outside of backward .. step, where there is none, zeros."""
        try:
            gradient = weight._hp_mapping.get_lp_grad_fragment(weight._index_in_param_group)
        except ValueError:
            return torch.zeros_like(weight._hp_mapping.hp_fragment)
        return gradient.view(-1)
