"""Private parts of DeepSpeed's optimizers: only this module and ``steps_in_place`` touch them.

A rank's pieces of weights, moments and gradients, as views that are edited in place between ``backward`` and ``step``:

- ``Stage0State``: ZeRO stage 0 in float32; every rank holds all of its tensor-parallel shard in the parameters.
- ``Stage1And2State``: stages 1 and 2; a rank holds one slice of each flat parameter group. DeepSpeed's record of
  where a parameter's piece lies (``_hp_mapping``) has no public form.
- ``Stage3State``: stage 3; a rank holds one slice of each parameter, of the same size on every rank.

``state_access`` picks the right one and checks, once, that the installed DeepSpeed has what it needs. Before views are
used ``wait_for_reductions`` orders them after the reductions.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload, stage3, stage_1_and_2
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn

from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.sparsity.dense_gradients import BlockShare
from megasparse.sparsity.state import StateAccess, StateFragment

MOMENTS = ("exp_avg", "exp_avg_sq", "weight_steps")


# Private names that each stage needs: of parameters, and of DeepSpeed's optimizer.
NEEDED = {
    1: (("_hp_mapping",), ("get_param_id", "loss_scale")),
    2: (("_hp_mapping",), ("get_param_id", "loss_scale")),
    3: (("ds_tensor", "ds_numel"), ("_get_fp32_opt_state_partition", "_get_fp32_grad_state_partition", "get_param_id")),
}


def state_access(
    engine: Any, optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter], mesh: Mesh
) -> StateAccess:
    """The view of the training state for the engine's ZeRO stage.

    weights: parameters by name, of the sparse matrices or of anything else. Raises RuntimeError where DeepSpeed lacks a
    part.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return Stage0State(optimizer, weights, mesh)
    of_parameters, of_optimizer = NEEDED[stage]
    missing = [name for name in of_optimizer if not hasattr(engine.optimizer, name)]
    missing += [
        f"{name} of {w}" for name in of_parameters for w, weight in weights.items() if not hasattr(weight, name)
    ]
    if missing:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} at ZeRO stage {stage} lacks {missing[0]}; versions 0.19.x are tested"
        )
    kind = Stage3State if stage == 3 else Stage1And2State
    return kind(engine.optimizer, optimizer, weights, mesh)


def optimized_tensors(
    zero_optimizer: Any, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """The tensors that the optimizer updates, flat pieces or parameters, each with its group.

    zero_optimizer: DeepSpeed's, around it; itself at stage 0.
    """
    groups = optimizer.param_groups
    if hasattr(zero_optimizer, "fp32_partitioned_groups_flat"):
        # ZeRO-3 fills the groups for the time of a step only.
        for number, flat in enumerate(zero_optimizer.fp32_partitioned_groups_flat):
            yield flat, groups[zero_optimizer.sub_group_to_group_id[number]]
        return
    for group in groups:
        for tensor in group["params"]:
            yield tensor, group


def wait_for_reductions(optimizer: Any) -> None:
    """Let what is given to the device from now on, such as an edit of gradients, come after their reductions.

    DeepSpeed reduces on a stream of its own where communication overlaps with the backward pass. The host waits only
    where gradients are copied to it, at stages 1 and 2 with offloading: what it reads must have come.
    optimizer: DeepSpeed's, or ours at stage 0.
    """
    if (wait_for_copies := getattr(optimizer, "_wait_for_offload_copies", None)) is not None:
        wait_for_copies()
    for name in ("reduction_stream", "reduce_and_partition_stream"):
        stream = getattr(optimizer, name, None)
        if stream is not None:
            get_accelerator().current_stream().wait_stream(stream)


@contextlib.contextmanager
def finite_gradients(optimizer: Any) -> Iterator[None]:
    """Take a step without DeepSpeed's own search for what is not finite: the caller knows that nothing is.

    The search takes kernels for each parameter and makes the host wait for the device, at stages 1 and 2 once more for
    every parameter group. optimizer: DeepSpeed's, or ours at stage 0.
    """
    modules = [module for module in (stage_1_and_2, stage3) if hasattr(module, "is_invalid_grad_norm")]
    with contextlib.ExitStack() as replaced:
        for module in modules:
            replaced.callback(setattr, module, "is_invalid_grad_norm", module.is_invalid_grad_norm)
            module.is_invalid_grad_norm = _never
        if getattr(optimizer, "check_grad_overflow", False):
            replaced.callback(setattr, optimizer, "check_grad_overflow", True)
            optimizer.check_grad_overflow = False
        yield


def _never(norm: Any) -> bool:
    return False


def set_micro_batch_size(engine: Any, size: int, global_batch_size: int) -> None:
    """Divide the steps that follow into micro-batches of `size` samples of a rank; between two steps only."""
    if size == engine.train_micro_batch_size_per_gpu():
        return
    engine.set_train_micro_batch_size(size)
    engine.set_train_batch_size(global_batch_size)
    # A step ends where the micro-batches since the start are a multiple of those in a step.
    engine.micro_steps = 0
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = engine.gradient_accumulation_steps()


def release(engine: Any) -> None:
    """Let go of an engine's model, for another engine to come. Hooks on gradients hold it where Python's garbage
    collection does not see them, and ZeRO stage 3 keeps modules in a list and in a cache that no engine owns."""
    engine.destroy()
    if engine.zero_optimization_stage() == 3:
        parameter_offload.FWD_MODULE_STACK.clear()
        for method in vars(PartitionedParameterCoordinator).values():
            # The cache is inside the wrapper that marks the method in traces.
            for cell in getattr(method, "__closure__", None) or ():
                getattr(cell.cell_contents, "cache_clear", lambda: None)()


class Stage0State:
    """Every rank holds all of its shard of every matrix; gradients are already averaged into ``parameter.grad``."""

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter], mesh: Mesh) -> None:
        self._optimizer, self._weights = optimizer, weights
        self.dense_gradients: Mapping[str, BlockShare] = {}
        self.shard, self.tensor_parallel, self.whole = CommunicationGroup(), mesh.tensor_parallel, mesh.tensor_parallel

    def fragments(self) -> dict[str, StateFragment]:
        return {name: self._fragment(weight) for name, weight in self._weights.items()}

    def gradients_changed(self, names: Iterable[str]) -> None:
        """Nothing to tell: norms are taken later."""

    def _fragment(self, weight: nn.Parameter) -> StateFragment:
        state = self._optimizer.state.get(weight, {})
        gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        moments = {key: state[key].view(-1) for key in MOMENTS if key in state}
        return StateFragment(0, weight.detach().view(-1), gradient.view(-1), moments)


class PartitionedState(ABC):
    """What stages 1 to 3 share: the pieces of all data-parallel ranks make up a tensor-parallel shard."""

    def __init__(
        self,
        zero_optimizer: Any,
        optimizer: torch.optim.Optimizer,
        weights: Mapping[str, nn.Parameter],
        mesh: Mesh,
    ) -> None:
        self._zero_optimizer, self._optimizer, self._weights = zero_optimizer, optimizer, weights
        self.dense_gradients: Mapping[str, BlockShare] = {}
        self.shard, self.tensor_parallel, self.whole = mesh.data_parallel, mesh.tensor_parallel, mesh.world

    def fragments(self) -> dict[str, StateFragment]:
        found = {name: self._fragment(weight) for name, weight in self._weights.items()}
        return {name: fragment for name, fragment in found.items() if fragment is not None}

    def gradients_changed(self, names: Iterable[str]) -> None:
        """With CPU offload the norms for clipping were taken in the backward pass: take those of `names` again."""
        norms = getattr(self._zero_optimizer, "norm_for_param_grads", {})
        for name in names:
            identity = self._zero_optimizer.get_param_id(self._weights[name])
            fragment = self._fragment(self._weights[name]) if identity in norms else None
            if fragment is not None:
                norms[identity] = fragment.gradient.norm(2).to(norms[identity])

    @abstractmethod
    def _fragment(self, weight: nn.Parameter) -> StateFragment | None:
        """This rank's piece of a parameter; None where it holds nothing of it."""


class Stage1And2State(PartitionedState):
    """A rank holds one slice of each flat parameter group, and of a matrix at most one piece."""

    def _fragment(self, weight: Any) -> StateFragment | None:
        piece = weight._hp_mapping
        if piece is None:
            return None
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


class Stage3State(PartitionedState):
    """A rank holds entries [rank n, (rank + 1) n) of every flat parameter; the last ones may be padding."""

    def _fragment(self, weight: Any) -> StateFragment | None:
        share = weight.ds_tensor.numel()
        start = self.shard.rank * share
        numel = min(share, weight.ds_numel - start)
        if numel <= 0:
            return None
        master = self._piece(weight, None)
        assert master is not None
        moments = {key: piece[:numel] for key in MOMENTS if (piece := self._piece(weight, key)) is not None}
        return StateFragment(
            start=start,
            master=master[:numel],
            gradient=self._gradient(weight, share)[:numel],
            moments=moments,
            gradient_scale=float(self._zero_optimizer.loss_scale),
        )

    def _piece(self, weight: Any, key: str | None) -> Tensor | None:
        """This rank's slice of the master weight or of a moment; None before the first optimizer step made it."""
        try:
            return self._zero_optimizer._get_fp32_opt_state_partition(weight, False, key)[0].detach()
        except KeyError:
            return None

    def _gradient(self, weight: Any, share: int) -> Tensor:
        """The averaged gradient of this rank's slice; before the first backward pass, where there is none, zeros."""
        try:
            gradient = self._zero_optimizer._get_fp32_grad_state_partition(weight, False)[0]
        except (KeyError, AttributeError):
            return torch.zeros(share, device=weight.device)
        return gradient.detach().view(-1)
